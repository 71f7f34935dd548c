"""Fused scalar expressions: elementwise nodes as plain data, and their code on LLVM values.

An `Expression` is `(input_dtypes, instructions, outputs)`, hashable and independent of shapes. An instruction is
`(op name, operand indices, attrs items, dtype)`; indices count the inputs first, then the instructions. Broadcasting is
the business of who loads the inputs: in an expression every value is one element.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from llvmlite import ir

from kgraph.codegen.cpu.builder import MEMORY_TYPES, KernelBuilder, compute_dtype, lanes_of
from kgraph.codegen.cpu.scalar_ops import EMITTERS, EXPENSIVE
from kgraph.ir import Graph, Node, Value

Expression = tuple

# Primitives that change no element: in an expression they stand for their operand.
TRANSPARENT = frozenset({"broadcast_to", "stop_gradient"})
SUPPORTED = frozenset(EMITTERS) | TRANSPARENT | {"constant", "full"}


def refuses(node: Node) -> str | None:
    """None if the node has a place in expressions, else the reason why not."""
    for value in (*node.inputs, *node.outputs):
        if value.dtype not in MEMORY_TYPES:
            return f"no scalar code for {value.dtype}"
    if node.name not in SUPPORTED:
        return f"no scalar code for {node.name}"
    if node.name == "constant" and node.attrs["value"].size != 1:
        return "a constant of several elements has to be an operand"
    if node.name == "bitcast_convert" and node.inputs[0].type.itemsize != node.output.type.itemsize:
        return "bitcast_convert between element sizes"
    return None


def encode(body: Graph) -> Expression | str:
    """The expression of a whole graph of elementwise nodes, or the reason why there is none."""
    return encode_nodes(body.nodes, body.inputs, body.outputs)


def encode_nodes(nodes: Iterable[Node], inputs: Sequence[Value], outputs: Sequence[Value]) -> Expression | str:
    """The expression that gives `outputs` from `inputs` by `nodes` (in order); a string says why there is none."""
    index: dict[Value, int] = {}
    for i, value in enumerate(inputs):
        if value.dtype not in MEMORY_TYPES:
            return f"no scalar code for {value.dtype}"
        index.setdefault(value, i)
    instructions: list[tuple] = []
    known: dict[tuple, int] = {}

    def append(instruction: tuple) -> int:
        if instruction not in known:
            known[instruction] = len(inputs) + len(instructions)
            instructions.append(instruction)
        return known[instruction]

    for node in nodes:
        reason = refuses(node)
        if reason is not None:
            return reason
        missing = [v for v in node.inputs if v not in index]
        if missing:
            return f"{node.name} reads {missing[0].type}, which is computed outside of the expression"
        if node.name in TRANSPARENT:
            index[node.output] = index[node.inputs[0]]
        elif node.name in ("constant", "full"):
            value = node.attrs["value"]
            index[node.output] = append(constant(value, node.output.dtype))
        else:
            operands = tuple(index[v] for v in node.inputs)
            attrs = () if node.name in ("convert", "bitcast_convert") else tuple(sorted(node.attrs.items()))
            index[node.output] = append((node.name, operands, attrs, node.output.dtype))
    unknown = [v for v in outputs if v not in index]
    if unknown:
        return f"the output {unknown[0].type} is computed outside of the expression"
    return (tuple(v.dtype for v in inputs), tuple(instructions), tuple(index[v] for v in outputs))


def identity(dtype: str) -> Expression:
    """The expression that gives its one input."""
    return ((dtype,), (), (0,))


def constant(value, dtype: str) -> tuple:
    """The instruction of a constant. NaN, infinities and -0.0 are spelled out, so that equality means identity."""
    value = np.asarray(value).reshape(()).item()
    if dtype == "bool":
        value = bool(value)
    elif dtype.startswith(("int", "uint")):
        value = int(value)
    else:
        value = float(value)
        value = value if math.isfinite(value) and (value or math.copysign(1, value) > 0) else str(value)
    return ("constant", (), (("value", value),), dtype)


def dtypes_of(expression: Expression) -> list[str]:
    """The dtype of every index."""
    return [*expression[0], *(i[3] for i in expression[1])]


def output_dtypes(expression: Expression) -> list[str]:
    dtypes = dtypes_of(expression)
    return [dtypes[o] for o in expression[2]]


def widest(expression: Expression) -> int:
    """Bytes of the widest compute type in use, which sets the number of lanes."""
    sizes = [np.dtype(compute_dtype(d)).itemsize for d in dtypes_of(expression)]
    return max(sizes, default=1)


def lanes(expression: Expression, target) -> int:
    """Lanes at which the widest values fill a vector register."""
    return max(1, target.vector_bytes // widest(expression))


def flops(expression: Expression) -> int:
    """A rough count of operations per element, transcendental functions weighted by their polynomials."""
    return sum(EXPENSIVE.get(i[0], 1) for i in expression[1] if i[0] != "constant")


def is_heavy(expression: Expression) -> bool:
    """Whether the code is long enough to overlap by itself and too long to be written out many times."""
    return flops(expression) > 8


def name(expression: Expression, limit: int = 4) -> str:
    """What is in the expression, such as `add_relu`."""
    names = [i[0] for i in expression[1] if i[0] != "constant"]
    return "_".join(names[:limit]) + ("_etc" if len(names) > limit else "")


def emit(b: KernelBuilder, expression: Expression, inputs: Sequence[ir.Value]) -> list[ir.Value]:
    """Code of the expression on values in compute form, all of one lane count; gives the outputs in compute form."""
    if len(inputs) != len(expression[0]):
        raise ValueError(f"the expression has {len(expression[0])} inputs, got {len(inputs)} values")
    return emit_lanes(b, expression, inputs, lanes_of(inputs[0]) if inputs else 1)


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
