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
reads each element before it writes the same element (the family says so in its KernelCall's notes["in_place"]).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

from llvmlite import ir

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
F32, F64, HALF = ir.FloatType(), ir.DoubleType(), ir.HalfType()
PTR = ir.PointerType()
VOID = ir.VoidType()

COMPUTE_TYPES = {
    "bool": I1,
    "int8": I8,
    "uint8": I8,
    "int16": I16,
    "uint16": I16,
    "int32": I32,
    "uint32": I32,
    "int64": I64,
    "uint64": I64,
    "float16": F32,
    "bfloat16": F32,
    "float32": F32,
    "float64": F64,
}
MEMORY_TYPES = {**COMPUTE_TYPES, "bool": I8, "float16": I16, "bfloat16": I16}
COMPUTE_DTYPES = {"float16": "float32", "bfloat16": "float32"}


def compute_dtype(dtype: str) -> str:
    """The dtype in which values of `dtype` live in registers."""
    return COMPUTE_DTYPES.get(dtype, dtype)


def itemsize(dtype: str) -> int:
    """Bytes of an element in memory."""
    kind = MEMORY_TYPES[dtype]
    return {F32: 4, F64: 8}.get(kind) or kind.width // 8


def _only_lane(mask: ir.Value) -> int | None:
    """The number of the one lane that a constant mask has on, or None."""
    if not isinstance(mask, ir.Constant) or not isinstance(mask.constant, (list, tuple)):
        return None
    on = [lane for lane, bit in enumerate(mask.constant) if (bit.constant if isinstance(bit, ir.Constant) else bit)]
    return on[0] if len(on) == 1 else None


def lanes_of(value: ir.Value) -> int:
    """How many lanes a data value has; 1 for a scalar."""
    return value.type.count if isinstance(value.type, ir.VectorType) else 1


def element_type(value: ir.Value) -> ir.Type:
    """The type of one lane."""
    return value.type.element if isinstance(value.type, ir.VectorType) else value.type


def is_float(value: ir.Value) -> bool:
    return isinstance(element_type(value), ir.FloatType | ir.DoubleType | ir.HalfType)


class Int:
    """A run-time 64-bit integer. `//` and `%` are unsigned: operands must not be negative."""

    __slots__ = ("b", "value")

    def __init__(self, b: KernelBuilder, value: ir.Value):
        self.b, self.value = b, value

    def __add__(self, other):
        return self if _is_constant(other, 0) else self._op("add", self, other, ("nsw",))

    __radd__ = __add__

    def __sub__(self, other):
        return self if _is_constant(other, 0) else self._op("sub", self, other, ("nsw",))

    def __rsub__(self, other):
        return self._op("sub", other, self, ("nsw",))

    def __mul__(self, other):
        if _is_constant(other, 0):
            return 0
        return self if _is_constant(other, 1) else self._op("mul", self, other, ("nsw",))

    __rmul__ = __mul__

    def __floordiv__(self, other):
        return self if _is_constant(other, 1) else self._op("udiv", self, other)

    def __mod__(self, other):
        return 0 if _is_constant(other, 1) else self._op("urem", self, other)

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


def _is_constant(x, value: int) -> bool:
    return isinstance(x, int) and x == value


class Pointer:
    """A typed address; `pointer + index` moves by elements. `scope` names the memory it points into."""

    __slots__ = ("b", "dtype", "scope", "value")

    def __init__(self, b: KernelBuilder, value: ir.Value, dtype: str, scope: str):
        self.b, self.value, self.dtype, self.scope = b, value, dtype, scope

    def __add__(self, index: int | Int) -> Pointer:
        if _is_constant(index, 0):
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
        return self.b.ir.load(self._slot, typ=self.type)

    def set(self, value: ir.Value) -> None:
        self.b.ir.store(value, self._slot)


class _LoopMetadata(ir.MDValue):
    """`distinct !{self, ...}`, the form in which LLVM identifies a loop."""

    def descr(self, buf):
        rest = "".join(f", {op.get_reference()}" for op in self.operands)
        buf += (f"distinct !{{ {self.get_reference()}{rest} }}", "\n")

    __eq__ = object.__eq__
    __hash__ = object.__hash__


class KernelBuilder:
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

    # -- operands and sizes -------------------------------------------------------------------------------------
    def operand(self, index: int, dtype: str) -> Pointer:
        """The buffer of operand `index` (inputs first, then outputs)."""
        if index not in self._operands:
            p = self._prologue_ir
            slot = p.gep(self.function.args[0], [ir.Constant(I64, index)], inbounds=True, source_etype=PTR)
            self._operands[index] = p.load(slot, typ=PTR, name=f"operand{index}_")
        return Pointer(self, self._operands[index], dtype, f"operand{index}")

    def size(self, index: int) -> Int:
        """Run-time integer `index` of the call's sizes."""
        if index not in self._sizes:
            p = self._prologue_ir
            slot = p.gep(self.function.args[1], [ir.Constant(I64, index)], inbounds=True, source_etype=I64)
            self._sizes[index] = Int(self, p.load(slot, typ=I64, name=f"size{index}_"))
        return self._sizes[index]

    def scratch(self, dtype: str, byte_offset: int | Int = 0) -> Pointer:
        """Per-thread memory, 64-byte aligned at offset 0."""
        at = self.function.args[4]
        if not _is_constant(byte_offset, 0):
            at = self.ir.gep(at, [self.i64(byte_offset)], inbounds=True, source_etype=I8)
        return Pointer(self, at, dtype, "scratch")

    def variable(self, initial: ir.Value) -> Variable:
        """A mutable register that starts as `initial`."""
        out = Variable(self, initial.type)
        out.set(initial)
        return out

    # -- constants and types ------------------------------------------------------------------------------------
    def type(self, dtype: str, lanes: int = 1) -> ir.Type:
        """The compute type of `dtype`: scalar for lanes == 1, else a vector."""
        kind = COMPUTE_TYPES[dtype]
        return kind if lanes == 1 else ir.VectorType(kind, lanes)

    def constant(self, value, dtype: str, lanes: int = 1) -> ir.Constant:
        """A Python scalar in every lane."""
        return self.constant_of(self.type(dtype, lanes), value)

    def constant_of(self, type: ir.Type, value) -> ir.Constant:
        """A Python scalar in every lane of an LLVM type."""
        element = type.element if isinstance(type, ir.VectorType) else type
        if isinstance(element, ir.IntType):
            value = int(value) & ((1 << element.width) - 1)
            if element.width == 1:
                value = bool(value)
        else:
            value = float(value)
        return ir.Constant(type, [value] * type.count if isinstance(type, ir.VectorType) else value)

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

    def store(self, pointer: Pointer, index, value: ir.Value, mask: ir.Value | None = None, raw: bool = False):
        """Writes the lanes of `value` (compute type; memory form if `raw`) to `pointer[index]` on."""
        if not raw:
            value = self.to_memory(value, pointer.dtype)
        at = (pointer + index).value
        align = itemsize(pointer.dtype)
        only = None if mask is None else _only_lane(mask)
        if mask is None:
            access = self.ir.store(value, at, align=align)
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

    def copy(self, destination: Pointer, source: Pointer, count) -> None:
        """memcpy of `count` elements between operands of one item size."""
        function = self._intrinsic("llvm.memcpy", VOID, [PTR, PTR, I64, I1], (PTR, PTR, I64))
        nbytes = self.i64(count * itemsize(source.dtype))
        self.ir.call(function, [destination.value, source.value, nbytes, ir.Constant(I1, False)])

    def prefetch(self, pointer: Pointer, index=0, write: bool = False, locality: int = 3) -> None:
        """Asks for the cache line of `pointer[index]`; never faults."""
        function = self._intrinsic("llvm.prefetch", VOID, [PTR, I32, I32, I32], (PTR,))
        arguments = [ir.Constant(I32, n) for n in (int(write), locality, 1)]
        at = self.ir.gep(pointer.value, [self.i64(index)], source_etype=MEMORY_TYPES[pointer.dtype])
        self.ir.call(function, [at, *arguments])

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

    # -- memory form <-> compute form ---------------------------------------------------------------------------
    def from_memory(self, value: ir.Value, dtype: str) -> ir.Value:
        """The compute form of a value in memory form."""
        lanes = lanes_of(value)
        if dtype == "bool":
            return self.ir.icmp_unsigned("!=", value, ir.Constant(value.type, None if lanes > 1 else 0))
        if dtype == "bfloat16":
            wide = self._vector(I32, lanes)
            bits = self.ir.shl(self.ir.zext(value, wide), self.constant_of(wide, 16))
            return self.ir.bitcast(bits, self._vector(F32, lanes))
        if dtype == "float16" and not self._has("f16c"):
            return self._half_to_float(value)
        if dtype == "float16":
            return self.ir.fpext(self.ir.bitcast(value, self._vector(HALF, lanes)), self._vector(F32, lanes))
        return value

    def to_memory(self, value: ir.Value, dtype: str) -> ir.Value:
        """The memory form of a value in compute form; floats are rounded to nearest even."""
        lanes = lanes_of(value)
        if dtype == "bool":
            return self.ir.zext(value, self._vector(I8, lanes))
        if dtype == "bfloat16":
            wide = self._vector(I32, lanes)
            bits = self.ir.bitcast(value, wide)
            even = self.ir.and_(self.ir.lshr(bits, self.constant_of(wide, 16)), self.constant_of(wide, 1))
            rounded = self.ir.add(bits, self.ir.add(even, self.constant_of(wide, 0x7FFF)))
            quiet = self.ir.or_(bits, self.constant_of(wide, 0x400000))
            rounded = self.ir.select(self.ir.fcmp_unordered("uno", value, value), quiet, rounded)
            return self.ir.trunc(self.ir.lshr(rounded, self.constant_of(wide, 16)), self._vector(I16, lanes))
        if dtype == "float16" and not self._has("f16c"):
            return self._float_to_half(value)
        if dtype == "float16":
            return self.ir.bitcast(self.ir.fptrunc(value, self._vector(HALF, lanes)), self._vector(I16, lanes))
        return value

    def _half_to_float(self, value: ir.Value) -> ir.Value:
        """float16 bits to float32 by integer arithmetic."""
        wide = self._vector(I32, lanes_of(value))
        constant = lambda n: self.constant_of(wide, n)
        bits = self.ir.zext(value, wide)
        magnitude = self.ir.shl(self.ir.and_(bits, constant(0x7FFF)), constant(13))
        # The exponent's bias differs by 112; a multiplication also settles denormals.
        scaled = self.mul(self.ir.bitcast(magnitude, self._vector(F32, lanes_of(value))), 2.0**112)
        result = self.ir.bitcast(scaled, wide)
        special = self.ir.icmp_unsigned(">=", magnitude, constant(0x0F800000))
        result = self.ir.select(special, self.ir.or_(magnitude, constant(0x7F800000)), result)
        sign = self.ir.shl(self.ir.and_(bits, constant(0x8000)), constant(16))
        return self.ir.bitcast(self.ir.or_(result, sign), scaled.type)

    def _float_to_half(self, value: ir.Value) -> ir.Value:
        """float32 to float16 bits by integer arithmetic, to nearest even."""
        wide = self._vector(I32, lanes_of(value))
        constant = lambda n: self.constant_of(wide, n)
        bits = self.ir.bitcast(value, wide)
        magnitude = self.ir.and_(bits, constant(0x7FFFFFFF))
        odd = self.ir.and_(self.ir.lshr(magnitude, constant(13)), constant(1))
        rounded = self.ir.add(magnitude, self.ir.add(odd, constant(0xFFF)))
        normal = self.ir.sub(self.ir.lshr(rounded, constant(13)), constant(112 << 10))
        # Below 2^-14 the addition of 0.5 leaves the rounded bits at the end of the mantissa.
        lifted = self.add(self.ir.bitcast(magnitude, value.type), 0.5)
        denormal = self.ir.sub(self.ir.bitcast(lifted, wide), constant(0x3F000000))
        result = self.ir.select(self.ir.icmp_unsigned("<", magnitude, constant(0x38800000)), denormal, normal)
        overflow = self.ir.icmp_unsigned(">=", magnitude, constant(0x477FF000))
        result = self.ir.select(overflow, constant(0x7C00), result)
        nan = self.ir.icmp_unsigned(">", magnitude, constant(0x7F800000))
        result = self.ir.select(nan, constant(0x7E00), result)
        sign = self.ir.and_(self.ir.lshr(bits, constant(16)), constant(0x8000))
        return self.ir.trunc(self.ir.or_(result, sign), self._vector(I16, lanes_of(value)))

    # -- arithmetic on data values ------------------------------------------------------------------------------
    # Either operand may be a Python scalar. `flags` are fast-math flags: "contract", "reassoc", "nsz" at most.
    def add(self, x, y, flags=()):
        return self._binary("fadd", "add", x, y, flags)

    def sub(self, x, y, flags=()):
        return self._binary("fsub", "sub", x, y, flags)

    def mul(self, x, y, flags=()):
        return self._binary("fmul", "mul", x, y, flags)

    def div(self, x, y, flags=()):
        """Float division."""
        return self._binary("fdiv", None, x, y, flags)

    def fma(self, x, y, z):
        """x * y + z, rounded once (on machines without the instruction: as good as once, and slow)."""
        like = next(v for v in (x, y, z) if isinstance(v, ir.Value))
        x, y, z = (self._like(v, like) for v in (x, y, z))
        if self._has("fma"):
            return self.intrinsic("llvm.fma", x, y, z)
        if element_type(x) == F32:  # float64 holds the product exactly
            wide = self._vector(F64, lanes_of(x))
            x, y, z = (self.ir.fpext(v, wide) for v in (x, y, z))
            return self.ir.fptrunc(self.add(self.mul(x, y), z), like.type)
        product, error = self._exact_product(x, y)
        total = self.add(product, z)
        # Large factors overflow on the way to the error; the sum alone is the best there is then.
        unknown = self.ir.fcmp_unordered("uno", error, error)
        return self.select(unknown, total, self.add(total, error))

    def _exact_product(self, x, y):
        """x * y of float64 as (rounded product, its error), by halves of the mantissas (Dekker, 1971)."""

        def halves(v):
            scaled = self.mul(v, 134217729.0)  # 2^27 + 1
            high = self.sub(scaled, self.sub(scaled, v))
            return high, self.sub(v, high)

        product = self.mul(x, y)
        (x_high, x_low), (y_high, y_low) = halves(x), halves(y)
        error = self.sub(self.mul(x_high, y_high), product)
        error = self.add(self.add(error, self.mul(x_high, y_low)), self.mul(x_low, y_high))
        return product, self.add(error, self.mul(x_low, y_low))

    def _has(self, feature: str) -> bool:
        """Whether the machine has an instruction set extension; all 64-bit ARM machines have what is asked for here."""
        return self.target.has(feature) or self.target.triple.startswith(("aarch64", "arm64"))

    def select(self, mask, on_true, on_false):
        like = on_true if isinstance(on_true, ir.Value) else on_false
        return self.ir.select(mask, self._like(on_true, like), self._like(on_false, like))

    def compare(self, symbol: str, x, y, signed: bool = True) -> ir.Value:
        """i1 lanes of `x symbol y`; with NaN every comparison is false except `!=`."""
        x, y = self._pair(x, y)
        if is_float(x):
            return (self.ir.fcmp_unordered if symbol == "!=" else self.ir.fcmp_ordered)(symbol, x, y)
        return (self.ir.icmp_signed if signed else self.ir.icmp_unsigned)(symbol, x, y)

    def intrinsic(self, name: str, *values: ir.Value) -> ir.Value:
        """An LLVM intrinsic whose operands and result share one type (llvm.sqrt, llvm.fabs, llvm.floor ...)."""
        type = values[0].type
        return self.ir.call(self._intrinsic(name, type, [v.type for v in values], (type,)), list(values))

    def convert_intrinsic(self, name: str, value: ir.Value, type: ir.Type) -> ir.Value:
        """An intrinsic from one type to another, such as llvm.fptosi.sat."""
        return self.ir.call(self._intrinsic(name, type, [value.type], (type, value.type)), [value])

    def broadcast(self, scalar: ir.Value, lanes: int) -> ir.Value:
        """A scalar in every lane; constants stay constants."""
        if lanes == 1:
            return scalar
        type = ir.VectorType(scalar.type, lanes)
        if isinstance(scalar, ir.Constant) and isinstance(scalar.constant, bool | int | float):
            return ir.Constant(type, [scalar.constant] * lanes)
        undefined = ir.Constant(type, ir.Undefined)
        first = self.ir.insert_element(undefined, scalar, ir.Constant(I32, 0))
        zeros = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
        return self.ir.shuffle_vector(first, undefined, zeros)

    def shuffle(self, x: ir.Value, y: ir.Value | None, lanes: list[int]) -> ir.Value:
        """The lanes named in `lanes` of x followed by y."""
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), lanes)
        return self.ir.shuffle_vector(x, y if y is not None else ir.Constant(x.type, ir.Undefined), mask)

    def reduce_lanes(self, value: ir.Value, combine: Callable) -> ir.Value:
        """All lanes of a vector folded by `combine(x, y)` in a fixed tree of halves; gives a scalar.

        A lane count that is no power of two leaves a remainder that joins last.
        """
        lanes = lanes_of(value)
        while lanes > 1:
            half = lanes // 2
            low = self.shuffle(value, None, list(range(half))) if half > 1 else self.lane(value, 0)
            high = self.shuffle(value, None, list(range(half, 2 * half))) if half > 1 else self.lane(value, 1)
            folded = combine(low, high)
            if lanes % 2:
                rest = self.reduce_lanes(folded, combine)
                return combine(rest, self.lane(value, lanes - 1))
            value, lanes = folded, half
        return value

    def any(self, mask: ir.Value) -> ir.Value:
        """i1: whether a lane of the mask is on."""
        lanes = lanes_of(mask)
        if lanes == 1:
            return mask
        bits = self.ir.bitcast(mask, ir.IntType(lanes))
        return self.ir.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))

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

    def can_look_up(self, value: ir.Value) -> bool:
        """Whether `look_up` exists for vectors like this."""
        return lanes_of(value) == 16 and element_type(value) in (F32, I32) and self.target.has("avx512f")

    def look_up(self, table: tuple[float, ...], indices: ir.Value) -> ir.Value:
        """Entries of a table of 16 float32 at a vector of 16 int32 (their low four bits), in one instruction."""
        vector = self._vector(F32, 16)
        function = self._intrinsic("llvm.x86.avx512.permvar.sf.512", vector, [vector, indices.type], ())
        return self.ir.call(function, [ir.Constant(vector, list(table)), indices])

    def scale(self, value: ir.Value, exponent: ir.Value) -> ir.Value:
        """value * 2^floor(exponent) on the vectors that can_look_up, with overflow and denormals as they should be."""
        mask, rounding = ir.Constant(I16, -1), ir.Constant(I32, 4)
        arguments = [value, exponent, value, mask, rounding]
        name = "llvm.x86.avx512.mask.scalef.ps.512"
        function = self._intrinsic(name, value.type, [a.type for a in arguments], ())
        return self.ir.call(function, arguments)

    def lane(self, vector: ir.Value, number: int) -> ir.Value:
        """One lane of a vector, as a scalar."""
        return self.ir.extract_element(vector, ir.Constant(I32, number))

    def vector(self, scalars: list[ir.Value]) -> ir.Value:
        """A vector of the given scalars."""
        if len(scalars) == 1:
            return scalars[0]
        out = ir.Constant(ir.VectorType(scalars[0].type, len(scalars)), ir.Undefined)
        for number, scalar in enumerate(scalars):
            out = self.ir.insert_element(out, scalar, ir.Constant(I32, number))
        return out

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
        others = {name: self.module.add_metadata([scopes[n] for n in names if n != name]) for name in names}
        for access, scope in self._accesses:
            access.set_metadata("alias.scope", own[scope])
            if len(names) > 1:
                access.set_metadata("noalias", others[scope])

    # -- internals ----------------------------------------------------------------------------------------------
    def _vector(self, element: ir.Type, lanes: int) -> ir.Type:
        return element if lanes == 1 else ir.VectorType(element, lanes)

    def _like(self, x, like: ir.Value) -> ir.Value:
        return x if isinstance(x, ir.Value) else self.constant_of(like.type, x)

    def _pair(self, x, y) -> tuple[ir.Value, ir.Value]:
        like = x if isinstance(x, ir.Value) else y
        return self._like(x, like), self._like(y, like)

    def _binary(self, float_op, int_op, x, y, flags):
        x, y = self._pair(x, y)
        if is_float(x):
            return getattr(self.ir, float_op)(x, y, flags=flags)
        return getattr(self.ir, int_op)(x, y)

    def _cast(self, operation: str, value: ir.Value, type: ir.Type) -> ir.Value:
        instruction = ir.CastInstr(self.ir.block, operation, value, type)
        self.ir._insert(instruction)
        return instruction

    def _intrinsic(self, name: str, result: ir.Type, arguments: list, overloads: tuple) -> ir.Function:
        full = ".".join([name, *map(_overload_name, overloads)])
        found = self.module.globals.get(full)
        return found or ir.Function(self.module, ir.FunctionType(result, arguments), full)

    # The last method: below it, annotations in this class would mean the method by `int`.
    def int(self, x: int | Int | ir.Value) -> Int:
        """An integer as an Int; values of narrower types are sign-extended."""
        if isinstance(x, Int):
            return x
        value = self.i64(x)
        return Int(self, self.ir.sext(value, I64) if value.type.width < 64 else value)


def _overload_name(type: ir.Type) -> str:
    if isinstance(type, ir.VectorType):
        return f"v{type.count}{_overload_name(type.element)}"
    if isinstance(type, ir.PointerType):
        return "p0"
    return {F32: "f32", F64: "f64", HALF: "f16"}.get(type) or f"i{type.width}"
