"""Operations on data values: conversion from and to memory, arithmetic, lanes of vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from kgraph.codegen.cpu.llvm_types import (
    COMPUTE_TYPES,
    F32,
    F64,
    HALF,
    I8,
    I16,
    I32,
    element_type,
    is_float,
    lanes_of,
    overload_name,
)


class DataValues:
    """The part of KernelBuilder that deals with scalars and vectors of data.

    `ir` is the llvmlite IRBuilder, `module` the module, `target` the machine.
    """

    ir: ir.IRBuilder
    module: ir.Module
    target: Any

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

    def instruction(self, name: str, type: ir.Type, *values: ir.Value) -> ir.Value:
        """An intrinsic that stands for one machine's instruction, whose name tells its types."""
        return self.ir.call(self._intrinsic(name, type, [v.type for v in values], ()), list(values))

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

    def joined(self, parts: Sequence[ir.Value]) -> ir.Value:
        """Vectors of one type, a power of two of them, one after the other in one vector."""
        if len(parts) == 1:
            return parts[0]
        half = len(parts) // 2
        low, high = self.joined(parts[:half]), self.joined(parts[half:])
        return self.shuffle(low, high, list(range(2 * low.type.count)))

    def part(self, vector: ir.Value, start: int, lanes: int) -> ir.Value:
        """The vector of `lanes` lanes from number `start` on."""
        return self.shuffle(vector, None, list(range(start, start + lanes)))

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

    # -- internals -----------------------------------------------------------------------------------------------------
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
        full = ".".join([name, *map(overload_name, overloads)])
        found = self.module.globals.get(full)
        return found or ir.Function(self.module, ir.FunctionType(result, arguments), full)

    # The last method: below it, annotations in this class would mean the method by `int`.
