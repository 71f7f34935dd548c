"""LLVM types of kernel data: the compute and the memory form of each dtype."""

from __future__ import annotations

from llvmlite import ir

from kgraph.codegen.expressions import COMPUTE_DTYPES, compute_dtype

__all__ = [
    "BF16",
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
    "compute_dtype",
    "element_type",
    "is_float",
    "itemsize",
    "lanes_of",
    "overload_name",
]

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))


class _BFloatType(ir.Type):
    """The 16-bit type of the instructions that multiply bfloat16; llvmlite has none."""

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, type(self))

    def __hash__(self):
        return hash(type(self))


BF16 = _BFloatType()
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


def itemsize(dtype: str) -> int:
    """Bytes of an element in memory."""
    kind = MEMORY_TYPES[dtype]
    return {F32: 4, F64: 8}.get(kind) or kind.width // 8


def lanes_of(value: ir.Value) -> int:
    """How many lanes a data value has; 1 for a scalar."""
    return value.type.count if isinstance(value.type, ir.VectorType) else 1


def element_type(value: ir.Value) -> ir.Type:
    """The type of one lane."""
    return value.type.element if isinstance(value.type, ir.VectorType) else value.type


def is_float(value: ir.Value) -> bool:
    return isinstance(element_type(value), ir.FloatType | ir.DoubleType | ir.HalfType)


def overload_name(type: ir.Type) -> str:
    if isinstance(type, ir.VectorType):
        return f"v{type.count}{overload_name(type.element)}"
    if isinstance(type, ir.PointerType):
        return "p0"
    return {F32: "f32", F64: "f64", HALF: "f16"}.get(type) or f"i{type.width}"
