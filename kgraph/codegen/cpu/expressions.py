"""Fused scalar expressions on LLVM values; their form as data is that of `kgraph.codegen.expressions`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from llvmlite import ir

from kgraph.codegen.cpu.builder import KernelBuilder, lanes_of
from kgraph.codegen.cpu.scalar_ops import EMITTERS
from kgraph.codegen.expressions import (
    SUPPORTED,
    TRANSPARENT,
    Expression,
    compute_dtype,
    constant,
    dtypes_of,
    encode,
    encode_nodes,
    flops,
    identity,
    name,
    output_dtypes,
    refuses,
)

__all__ = [
    "SUPPORTED",
    "TRANSPARENT",
    "Expression",
    "constant",
    "dtypes_of",
    "emit",
    "emit_lanes",
    "encode",
    "encode_nodes",
    "flops",
    "identity",
    "is_heavy",
    "lanes",
    "name",
    "output_dtypes",
    "refuses",
    "side_by_side",
    "widest",
]

LONG = 24  # operations from which on two vectors are worked on side by side


def widest(expression: Expression) -> int:
    """Bytes of the widest compute type in use, which sets the number of lanes."""
    sizes = [np.dtype(compute_dtype(d)).itemsize for d in dtypes_of(expression)]
    return max(sizes, default=1)


def lanes(expression: Expression, target) -> int:
    """Lanes at which the widest values fill a vector register."""
    return max(1, target.vector_bytes // widest(expression))


def side_by_side(expression: Expression, target) -> int:
    """Vectors that the code of an expression is written for at once: four of long ones, for narrow registers.

    Its steps wait for each other, and few vectors fit into the window in which a processor looks for work; several side
    by side share constants, which registers cannot hold. Registers of 64 bytes take two turns of the arithmetic units
    anyway.
    """
    return 4 if target.vector_bytes <= 32 and flops(expression) >= LONG else 1


def is_heavy(expression: Expression) -> bool:
    """Whether the code is long enough to overlap by itself and too long to be written out many times."""
    return flops(expression) > 8


def emit(b: KernelBuilder, expression: Expression, inputs: Sequence[ir.Value]) -> list[ir.Value]:
    """Code of the expression on values in compute form, all of one lane count; gives the outputs in compute form."""
    if len(inputs) != len(expression[0]):
        raise ValueError(f"the expression has {len(expression[0])} inputs, got {len(inputs)} values")
    return emit_lanes(b, expression, inputs, lanes_of(inputs[0]) if inputs else 1)


def emit_each(b: KernelBuilder, expression: Expression, vectors: Sequence[Sequence[ir.Value]]) -> list[list[ir.Value]]:
    """`emit` for several lists of inputs of one lane count, as one wide vector; gives their outputs."""
    if len(vectors) == 1:
        return [emit(b, expression, vectors[0])]
    width = lanes_of(vectors[0][0])
    results = emit(b, expression, [b.joined(parts) for parts in zip(*vectors, strict=True)])
    return [[b.part(r, k * width, width) for r in results] for k in range(len(vectors))]


def emit_lanes(b: KernelBuilder, expression: Expression, inputs: Sequence[ir.Value], width: int) -> list[ir.Value]:
    """`emit` for an expression that may have no inputs: the lane count is given."""
    values = list(inputs)
    dtypes = dtypes_of(expression)
    for op, operands, attrs, dtype in expression[1]:
        if op == "constant":
            values.append(b.constant(attrs[0][1], dtype, width))
        else:
            arguments = [values[o] for o in operands]
            values.append(EMITTERS[op](b, arguments, [dtypes[o] for o in operands], dtype, **dict(attrs)))
    return [values[o] for o in expression[2]]
