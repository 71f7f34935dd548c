"""KernelBuilder: a small layer over llvmlite for writing CPU kernels with explicit vectors.

A kernel author handles four kinds of things:

- `Int`: a 64-bit run-time integer (index, size) with operators; plain Python ints mix freely and fold.
- `Pointer`: a typed address (an operand, scratch, or one of them plus an offset in elements).
- data values: bare llvmlite values, scalars (lanes == 1) or vectors, in the *compute* type of their dtype: float16 and
  bfloat16 compute in float32, bool is i1. `load` and `store` convert between the compute and the memory form.
- `Variable`: a mutable register (a stack slot that LLVM promotes), for accumulators across loops.

    b = KernelBuilder("axpy", target)
    x, y = b.operand(0, "float32"), b.operand(1, "float32")
    def body(i, mask, slot):
        b.store(y, i, b.mul(b.load(x, i, lanes, mask), 2.0), mask)
    b.vector_loop(b.begin, b.end, lanes, body, unroll=4)
    return b.ir_text()

Different operands are promised not to overlap, except that an output may be the very buffer of an input when the kernel
reads each element before it writes the same element (the family says so in its KernelCall's notes["inplace"]).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

from llvmlite import ir

from kgraph.codegen.cpu.data_values import DataValues
from kgraph.codegen.cpu.llvm_types import (
    COMPUTE_DTYPES,
    COMPUTE_TYPES,
    F32,
    F64,
    HALF,
    I1,
    I8,
    I16,
    I32,
    I64,
    MEMORY_TYPES,
    PTR,
    VOID,
    compute_dtype,
    element_type,
    is_float,
    itemsize,
    lanes_of,
)
from kgraph.codegen.cpu.operands import Int, Pointer, Variable, is_constant

__all__ = [
    "COMPUTE_DTYPES",
    "COMPUTE_TYPES",
    "F32",
    "F64",
    "HALF",
    "I1",
    "I8",
    "I16",
    "I32",
    "I64",
    "MEMORY_TYPES",
    "PTR",
    "VOID",
    "Int",
    "KernelBuilder",
    "Pointer",
    "Variable",
    "compute_dtype",
    "element_type",
    "is_float",
    "itemsize",
    "lanes_of",
]


def _only_lane(mask: ir.Value) -> int | None:
    """The number of the one lane that a constant mask has on, or None."""
    if not isinstance(mask, ir.Constant) or not isinstance(mask.constant, (list, tuple)):
        return None
    on = [lane for lane, bit in enumerate(mask.constant) if (bit.constant if isinstance(bit, ir.Constant) else bit)]
    return on[0] if len(on) == 1 else None


class _LoopMetadata(ir.MDValue):
    """`distinct !{self, ...}`, the form in which LLVM identifies a loop."""

    def descr(self, buf):
        rest = "".join(f", {op.get_reference()}" for op in self.operands)
        buf += (f"distinct !{{ {self.get_reference()}{rest} }}", "\n")

    __eq__ = object.__eq__
    __hash__ = object.__hash__


class KernelBuilder(DataValues):
    """Builds the LLVM function `kernel(buffers, sizes, begin, end, scratch)`; see the module's docstring.

    name: the module's name, for readers of the IR. target: a codegen target (`vector_bytes`, `lanes(dtype)` are used).
    `ir` is the llvmlite IRBuilder, for what has no method here.
    """

    def __init__(self, name: str, target):
        self.target = target
        self.module = ir.Module(name)
        function_type = ir.FunctionType(VOID, [PTR, PTR, I64, I64, PTR])
        self.function = ir.Function(self.module, function_type, "kernel")
        self.function.attributes.add("nounwind")
        for argument, label in zip(self.function.args, ("buffers", "sizes", "begin", "end", "scratch")):
            argument.name = label
            if isinstance(argument.type, ir.PointerType):
                argument.add_attribute("noalias")
        # Operand addresses and sizes are read once, in a block of their own ahead of all code.
        self._prologue = self.function.append_basic_block("prologue")
        body = self.function.append_basic_block("body")
        self.ir = ir.IRBuilder(body)
        self._prologue_ir = ir.IRBuilder(self._prologue)
        self._prologue_end = self._prologue_ir.branch(body)
        self._prologue_ir.position_before(self._prologue_end)
        self.begin = Int(self, self.function.args[2])
        self.end = Int(self, self.function.args[3])
        self._operands: dict[int, ir.Value] = {}
        self._sizes: dict[int, Int] = {}
        self._accesses: list[tuple[ir.Instruction, str]] = []
        self._shared: set[frozenset] = set()

    def align_stack(self) -> None:
        """For functions that keep more vectors than there are registers: otherwise LLVM puts the rest where they cross
        cache lines."""
        self.function.attributes.alignstack = self.target.vector_bytes

    # -- operands and sizes -------------------------------------------------------------------------------------
    def operand(self, index: int, dtype: str) -> Pointer:
        """The buffer of operand `index` (inputs first, then outputs)."""
        if index not in self._operands:
            p = self._prologue_ir
            slot = p.gep(self.function.args[0], [ir.Constant(I64, index)], inbounds=True, source_etype=PTR)
            self._operands[index] = p.load(slot, typ=PTR, name=f"operand{index}_")
        return Pointer(self, self._operands[index], dtype, f"operand{index}")

    def operand_at(self, index: int | Int, dtype: str, scope: str) -> Pointer:
        """The buffer of an operand whose number is known at run time; `scope` names what it cannot overlap with."""
        slot = self.ir.gep(self.function.args[0], [self.i64(index)], inbounds=True, source_etype=PTR)
        return Pointer(self, self.ir.load(slot, typ=PTR), dtype, scope)

    def size(self, index: int) -> Int:
        """Run-time integer `index` of the call's sizes."""
        if index not in self._sizes:
            p = self._prologue_ir
            slot = p.gep(self.function.args[1], [ir.Constant(I64, index)], inbounds=True, source_etype=I64)
            self._sizes[index] = Int(self, p.load(slot, typ=I64, name=f"size{index}_"))
        return self._sizes[index]

    def size_at(self, index: int | Int) -> Int:
        """The run-time integer of the call's sizes whose number is known at run time."""
        slot = self.ir.gep(self.function.args[1], [self.i64(index)], inbounds=True, source_etype=I64)
        return Int(self, self.ir.load(slot, typ=I64))

    def scratch(self, dtype: str, byte_offset: int | Int = 0) -> Pointer:
        """Per-thread memory, 64-byte aligned at offset 0."""
        at = self.function.args[4]
        if not is_constant(byte_offset, 0):
            at = self.ir.gep(at, [self.i64(byte_offset)], inbounds=True, source_etype=I8)
        return Pointer(self, at, dtype, "scratch")

    def may_share(self, one: Pointer, other: Pointer) -> None:
        """Takes back the promise that two operands do not overlap: accesses keep the order in which they were built.

        For kernels with several outputs, one of which may overwrite an operand that the others read: with one output,
        its dependence on the operand keeps the order.
        """
        self._shared.add(frozenset((one.scope, other.scope)))

    def variable(self, initial: ir.Value) -> Variable:
        """A mutable register that starts as `initial`."""
        out = Variable(self, initial.type)
        out.set(initial)
        return out

    def i64(self, x: int | Int | ir.Value) -> ir.Value:
        """An integer as an i64 value."""
        if isinstance(x, Int):
            return x.value
        return ir.Constant(I64, x) if isinstance(x, int) else x

    def min(self, x, y):
        """The lesser of two integers."""
        return self._int_pick("<", x, y)

    def max(self, x, y):
        """The greater of two integers."""
        return self._int_pick(">", x, y)

    def _int_pick(self, symbol, x, y):
        if isinstance(x, int) and isinstance(y, int):
            return min(x, y) if symbol == "<" else max(x, y)
        x, y = self.i64(x), self.i64(y)
        return Int(self, self.ir.select(self.ir.icmp_signed(symbol, x, y), x, y))

    def ceil_div(self, x, y):
        """Non-negative integer division rounded up."""
        return (x + (y - 1)) // y

    # -- control flow -------------------------------------------------------------------------------------------
    @contextmanager
    def loop(self, start, stop, step=1, unroll: bool | int | None = False):
        """`for i in range(start, stop, step)` for a positive step; gives the Int `i`.

        unroll: False leaves the body as written (bodies are mostly unrolled by hand), an int asks for that factor,
        None lets LLVM decide.
        """
        start_value, stop_value, step_value = self.i64(start), self.i64(stop), self.i64(step)
        before = self.ir.block
        body = self.function.append_basic_block("loop")
        after = self.function.append_basic_block("after")
        self.ir.cbranch(self.ir.icmp_signed("<", start_value, stop_value), body, after)
        self.ir.position_at_end(body)
        index = self.ir.phi(I64, name="i")
        index.add_incoming(start_value, before)
        yield Int(self, index)
        following = self.ir.add(index, step_value, flags=("nsw",))
        branch = self.ir.cbranch(self.ir.icmp_signed("<", following, stop_value), body, after)
        if unroll is not None:
            branch.set_metadata("llvm.loop", self._loop_metadata(unroll))
        index.add_incoming(following, self.ir.block)
        self.ir.position_at_end(after)

    def _loop_metadata(self, unroll: bool | int) -> _LoopMetadata:
        if unroll is False:
            how = self.module.add_metadata(["llvm.loop.unroll.disable"])
        else:
            how = self.module.add_metadata(["llvm.loop.unroll.count", ir.Constant(I32, int(unroll))])
        no_vectors = self.module.add_metadata(["llvm.loop.vectorize.width", ir.Constant(I32, 1)])
        return _LoopMetadata(self.module, [how, no_vectors], name=str(len(self.module.metadata)))

    def if_then(self, condition: ir.Value, likely: bool | None = None):
        """`with b.if_then(i1):` runs the block where the condition holds."""
        return self.ir.if_then(condition, likely)

    def if_else(self, condition: ir.Value, likely: bool | None = None):
        """`with b.if_else(i1) as (then, otherwise): with then: ... with otherwise: ...`"""
        return self.ir.if_else(condition, likely)

    def vector_loop(
        self, start, stop, lanes: int, body: Callable, unroll: int = 1, step: int = 0, tail: bool = True
    ) -> None:
        """Calls `body(index, mask, slot)` to emit code for [start, stop) in vectors of `lanes`.

        The main loop covers `unroll` vectors per turn (`mask` None, `slot` 0..unroll-1, to tell accumulators apart);
        then single vectors; then, if `tail`, one vector under a mask. With lanes == 1 nothing is masked.
        """
        count = stop - start
        if isinstance(count, int):
            self._static_vector_loop(start, count, lanes, body, unroll, tail)
            return
        position = start
        for factor in dict.fromkeys((unroll, 1)):
            width = lanes * factor
            whole = count if width == 1 else count - count % width
            limit = start + whole
            with self.loop(position, limit, width) as i:
                for slot in range(factor):
                    body(i + slot * lanes, None, slot)
            position = limit
        if tail and lanes > 1:
            with self.if_then(self.int(position) < stop):
                body(position, self.tail_mask(stop - position, lanes), 0)

    def _static_vector_loop(self, start, count: int, lanes: int, body, unroll: int, tail: bool) -> None:
        """The same for a count that is known: whole turns in a loop, the rest written out."""
        turns, rest = divmod(count, lanes * unroll)
        done = turns * lanes * unroll
        if turns == 1:
            for slot in range(unroll):
                body(start + slot * lanes, None, slot)
        elif turns:
            with self.loop(start, start + done, lanes * unroll) as i:
                for slot in range(unroll):
                    body(i + slot * lanes, None, slot)
        for slot in range(rest // lanes):
            body(start + (done + slot * lanes), None, slot)
        done += rest // lanes * lanes
        if tail and count > done:
            body(start + done, self.tail_mask(count - done, lanes), 0)

    # -- memory -------------------------------------------------------------------------------------------------
    def load(self, pointer: Pointer, index=0, lanes: int = 1, mask: ir.Value | None = None, raw: bool = False):
        """`lanes` consecutive elements from `pointer[index]` on, in the compute type; lanes off in `mask` give zero.

        raw: the memory form instead (bool as i8, float16 and bfloat16 as i16), for kernels that only move data.
        """
        kind = MEMORY_TYPES[pointer.dtype]
        type = kind if lanes == 1 else ir.VectorType(kind, lanes)
        at = (pointer + index).value
        align = itemsize(pointer.dtype)
        if mask is None:
            value = self.ir.load(at, typ=type, align=align)
        else:
            function = self._intrinsic("llvm.masked.load", type, [PTR, I32, mask.type, type], (type, PTR))
            value = self.ir.call(function, [at, ir.Constant(I32, align), mask, ir.Constant(type, None)])
        self._accesses.append((value, pointer.scope))
        return value if raw else self.from_memory(value, pointer.dtype)

    def store(
        self,
        pointer: Pointer,
        index,
        value: ir.Value,
        mask: ir.Value | None = None,
        raw: bool = False,
        streaming: bool = False,
    ):
        """Writes the lanes of `value` (compute type; memory form if `raw`) to `pointer[index]` on.

        streaming: past the caches, where there is no mask. The address has to be a multiple of the vector's size, and
        a fence has to follow before another thread is told of the data.
        """
        if not raw:
            value = self.to_memory(value, pointer.dtype)
        at = (pointer + index).value
        align = itemsize(pointer.dtype)
        only = None if mask is None else _only_lane(mask)
        if mask is None:
            access = self.ir.store(value, at, align=align * lanes_of(value) if streaming else align)
            if streaming:
                access.set_metadata("nontemporal", self.module.add_metadata([ir.Constant(I32, 1)]))
        elif only is not None:
            access = self.ir.store(self.lane(value, only), (pointer + index + only).value, align=align)
        else:
            narrow = isinstance(MEMORY_TYPES[pointer.dtype], ir.IntType) and itemsize(pointer.dtype) < 8
            if narrow and not raw and not isinstance(mask, ir.Constant):
                mask = self._opaque_mask(mask)
            arguments = [value.type, PTR, I32, mask.type]
            function = self._intrinsic("llvm.masked.store", VOID, arguments, (value.type, PTR))
            access = self.ir.call(function, [value, at, ir.Constant(I32, align), mask])
        self._accesses.append((access, pointer.scope))

    def _opaque_mask(self, mask: ir.Value) -> ir.Value:
        """The same mask, hidden from constant folding.

        LLVM 22 compiles a masked store of a truncated vector, where just one lane of the mask is on and that is known,
        to a scalar store of the wide element, which overwrites what follows. `store` writes such a lane itself where
        the mask is a constant; this keeps masks from becoming constants later, when loops unroll or calls inline.
        """
        bits = ir.IntType(mask.type.count)
        word = self.ir.bitcast(mask, bits)
        word = self.ir.zext(word, I64) if bits.width < 64 else word
        word = self.ir.asm(ir.FunctionType(I64, [I64]), "", "=r,0", [word], False)
        word = self.ir.trunc(word, bits) if bits.width < 64 else word
        return self.ir.bitcast(word, mask.type)

    def prefetch(self, pointer: Pointer, index=0, locality: int = 3) -> None:
        """Requests the cache line of `pointer[index]`, which need not exist, for reading.

        locality: 3 brings it into the first-level cache, 2 into the second.
        """
        fetch = self._intrinsic("llvm.prefetch", VOID, [PTR, I32, I32, I32], (PTR,))
        self.ir.call(fetch, [(pointer + index).value, *(ir.Constant(I32, n) for n in (0, locality, 1))])

    def hidden(self, pointer: Pointer) -> Pointer:
        """The same address, which LLVM does not know to be the same: it loads again what it would keep, and spill."""
        at = self.ir.asm(ir.FunctionType(PTR, [PTR]), "", "=r,0", [pointer.value], False)
        return Pointer(self, at, pointer.dtype, pointer.scope)

    def load_broadcast(self, pointer: Pointer, index, lanes: int):
        """One element in every lane."""
        return self.broadcast(self.load(pointer, index), lanes)

    def gather(self, pointer: Pointer, indices: ir.Value, mask: ir.Value | None = None):
        """Elements `pointer[indices[l]]` for a vector of i32 or i64 indices, in the compute type."""
        lanes = lanes_of(indices)
        if lanes == 1:
            return self.load(pointer, self.int(indices))
        kind = MEMORY_TYPES[pointer.dtype]
        type = ir.VectorType(kind, lanes)
        # llvmlite has no vectors of pointers in getelementptr, so addresses are made as integers.
        wide = ir.VectorType(I64, lanes)
        offsets = indices if element_type(indices) == I64 else self.ir.sext(indices, wide)
        base = self.broadcast(self.ir.ptrtoint(pointer.value, I64), lanes)
        size = itemsize(pointer.dtype)
        offsets = self.ir.mul(offsets, self.constant_of(wide, size)) if size > 1 else offsets
        pointers_type = ir.VectorType(PTR, lanes)
        addresses = self._cast("inttoptr", self.ir.add(base, offsets), pointers_type)
        mask = mask if mask is not None else self.constant(True, "bool", lanes)
        function = self._intrinsic(
            "llvm.masked.gather", type, [pointers_type, I32, mask.type, type], (type, pointers_type)
        )
        value = self.ir.call(function, [addresses, ir.Constant(I32, size), mask, ir.Constant(type, None)])
        self._accesses.append((value, pointer.scope))
        return self.from_memory(value, pointer.dtype)

    def table(self, name: str, values: tuple, dtype: str) -> Pointer:
        """Constants in the kernel's own read-only data."""
        kind = MEMORY_TYPES[dtype]
        found = self.module.globals.get(name)
        if found is None:
            found = ir.GlobalVariable(self.module, ir.ArrayType(kind, len(values)), name)
            found.initializer = ir.Constant(found.value_type, [ir.Constant(kind, v) for v in values])
            found.linkage, found.global_constant = "private", True
        address = self.ir.gep(found, [ir.Constant(I64, 0)], inbounds=True, source_etype=kind)
        address.type = PTR
        return Pointer(self, address, dtype, name)

    def copy(self, destination: Pointer, source: Pointer, count) -> None:
        """memcpy of `count` elements between operands of one item size."""
        function = self._intrinsic("llvm.memcpy", VOID, [PTR, PTR, I64, I1], (PTR, PTR, I64))
        nbytes = self.i64(count * itemsize(source.dtype))
        self.ir.call(function, [destination.value, source.value, nbytes, ir.Constant(I1, False)])

    def tail_mask(self, remaining, lanes: int) -> ir.Value:
        """<lanes x i1> that is on for lanes below `remaining`."""
        if isinstance(remaining, int):
            return ir.Constant(ir.VectorType(I1, lanes), [lane < remaining for lane in range(lanes)])
        clipped = self.ir.trunc(self.i64(self.min(remaining, lanes)), I32)
        return self.ir.icmp_signed("<", self.lane_numbers("int32", lanes), self.broadcast(clipped, lanes))

    def lane_numbers(self, dtype: str, lanes: int) -> ir.Value:
        """0, 1, 2, ... per lane."""
        if lanes == 1:
            return self.constant(0, dtype)
        return ir.Constant(ir.VectorType(COMPUTE_TYPES[dtype], lanes), list(range(lanes)))

    # -- output -------------------------------------------------------------------------------------------------
    def ir_text(self) -> str:
        """Ends the function and gives the module as LLVM IR text. The builder is spent afterwards."""
        self.ir.ret_void()
        self._attach_alias_scopes()
        return str(self.module)

    def _attach_alias_scopes(self) -> None:
        """Tells LLVM which memory each access touches, so that a store to one operand orders no load of another."""
        names = sorted({scope for _, scope in self._accesses})
        domain = self.module.add_metadata(["operands"])
        scopes = {name: self.module.add_metadata([name, domain]) for name in names}
        own = {name: self.module.add_metadata([scopes[name]]) for name in names}
        apart = lambda name: [n for n in names if n != name and frozenset((n, name)) not in self._shared]
        others = {name: self.module.add_metadata([scopes[n] for n in apart(name)]) for name in names if apart(name)}
        for access, scope in self._accesses:
            access.set_metadata("alias.scope", own[scope])
            if scope in others:
                access.set_metadata("noalias", others[scope])

    # -- internals ----------------------------------------------------------------------------------------------
    def int(self, x: int | Int | ir.Value) -> Int:
        """An integer as an Int; values of narrower types are sign-extended."""
        if isinstance(x, Int):
            return x
        value = self.i64(x)
        return Int(self, self.ir.sext(value, I64) if value.type.width < 64 else value)
