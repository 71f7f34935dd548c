"""Run-time integers, typed addresses and mutable registers of a kernel under construction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llvmlite import ir

from kgraph.codegen.cpu.llvm_types import MEMORY_TYPES, PTR

if TYPE_CHECKING:
    from kgraph.codegen.cpu.builder import KernelBuilder


class Int:
    """A run-time 64-bit integer. `//` and `%` are unsigned: operands must not be negative."""

    __slots__ = ("b", "value")

    def __init__(self, b: KernelBuilder, value: ir.Value):
        self.b, self.value = b, value

    def __add__(self, other):
        return self if is_constant(other, 0) else self._op("add", self, other, ("nsw",))

    __radd__ = __add__

    def __sub__(self, other):
        return self if is_constant(other, 0) else self._op("sub", self, other, ("nsw",))

    def __rsub__(self, other):
        return self._op("sub", other, self, ("nsw",))

    def __mul__(self, other):
        if is_constant(other, 0):
            return 0
        return self if is_constant(other, 1) else self._op("mul", self, other, ("nsw",))

    __rmul__ = __mul__

    def __floordiv__(self, other):
        return self if is_constant(other, 1) else self._op("udiv", self, other)

    def __mod__(self, other):
        return 0 if is_constant(other, 1) else self._op("urem", self, other)

    def __and__(self, other):
        return self._op("and_", self, other)

    def _op(self, name, x, y, flags=()):
        b = self.b
        return Int(b, getattr(b.ir, name)(b.i64(x), b.i64(y), flags=flags))

    def _compare(self, symbol, other):
        return self.b.ir.icmp_signed(symbol, self.value, self.b.i64(other))

    def __lt__(self, other):
        return self._compare("<", other)

    def __le__(self, other):
        return self._compare("<=", other)

    def __gt__(self, other):
        return self._compare(">", other)

    def __ge__(self, other):
        return self._compare(">=", other)

    def equals(self, other) -> ir.Value:
        """i1 of equality (`==` keeps Python's meaning)."""
        return self._compare("==", other)

    def __bool__(self):
        raise TypeError("an Int has no value while the kernel is being built; use b.if_then")


def is_constant(x, value: int) -> bool:
    """Whether x is that Python int, rather than a run-time integer."""
    return isinstance(x, int) and x == value


class Pointer:
    """A typed address; `pointer + index` moves by elements. `scope` names the memory it points into."""

    __slots__ = ("b", "dtype", "scope", "value")

    def __init__(self, b: KernelBuilder, value: ir.Value, dtype: str, scope: str):
        self.b, self.value, self.dtype, self.scope = b, value, dtype, scope

    def __add__(self, index: int | Int) -> Pointer:
        if is_constant(index, 0):
            return self
        b = self.b
        at = b.ir.gep(self.value, [b.i64(index)], inbounds=True, source_etype=MEMORY_TYPES[self.dtype])
        return Pointer(b, at, self.dtype, self.scope)

    def cast(self, dtype: str) -> Pointer:
        """The same address read as another dtype."""
        return Pointer(self.b, self.value, dtype, self.scope)


class Variable:
    """A mutable register of one type; LLVM promotes it to SSA form."""

    __slots__ = ("_slot", "b", "type")

    def __init__(self, b: KernelBuilder, type: ir.Type):
        self.b, self.type = b, type
        with b.ir.goto_entry_block():
            self._slot = b.ir.alloca(type)
        self._slot.type = PTR  # llvmlite still spells allocas as typed pointers

    def get(self) -> ir.Value:
        """The value now."""
        return self.b.ir.load(self._slot, typ=self.type)

    def set(self, value: ir.Value) -> None:
        """Make `value` the value from here on."""
        self.b.ir.store(value, self._slot)
