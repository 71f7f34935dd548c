"""Fused scalar expressions: elementwise nodes as plain data, independent of the machine that they run on.

An `Expression` is `(input_dtypes, instructions, outputs)`, hashable and independent of shapes. An instruction is
`(op name, operand indices, attrs items, dtype)`; indices count the inputs first, then the instructions. Broadcasting is
the business of who loads the inputs: in an expression every value is one element.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from kgraph.ir import Graph, Node, Value

Expression = tuple

# Dtypes that expressions know. float16 and bfloat16 are computed in float32.
DTYPES = frozenset("bool int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 bfloat16 float32 float64".split())
COMPUTE_DTYPES = {"float16": "float32", "bfloat16": "float32"}

# The elementwise primitives that every code generator has scalar code for.
OPERATIONS = frozenset(
    (
        "abs acos acosh add asin asinh atan atan2 atanh bitcast_convert bitwise_and bitwise_not bitwise_or "
        "bitwise_xor cbrt ceil convert cos cosh digamma div elu eq erf erf_inv erfc exp exp2 expm1 floor "
        "floor_divide ge gelu gt hypot is_finite is_inf is_nan le leaky_relu lgamma log log1p log2 logaddexp "
        "logical_and logical_not logical_or logical_xor logistic lt maximum minimum mod mul ne neg nextafter pow "
        "relu relu6 rem round_nearest_even rsqrt select shift_left shift_right sign silu sin sinh softplus sqrt "
        "sub tan tanh trunc"
    ).split()
)

# Operations per element of what is not one instruction, for estimates of time.
EXPENSIVE = {
    **dict.fromkeys("exp exp2 expm1 log log2 log1p".split(), 16),
    **dict.fromkeys("tanh logistic silu erf sin cos gelu".split(), 24),
    **dict.fromkeys("softplus elu logaddexp tan atan atan2 sinh cosh mod rem floor_divide".split(), 40),
    **dict.fromkeys("pow asin acos asinh acosh atanh cbrt erfc erf_inv".split(), 80),
    **dict.fromkeys("lgamma digamma".split(), 150),
    **dict.fromkeys("div sqrt rsqrt hypot".split(), 8),
}

# Primitives that change no element: in an expression they stand for their operand.
TRANSPARENT = frozenset({"broadcast_to", "stop_gradient"})
SUPPORTED = OPERATIONS | TRANSPARENT | {"constant", "full"}

# The same bits with operands exchanged, so that one kernel serves both orders; extrema are not, for zeros.
_EITHER_ORDER = ("add", "mul")


def compute_dtype(dtype: str) -> str:
    """The dtype in which values of `dtype` live in registers."""
    return COMPUTE_DTYPES.get(dtype, dtype)


def refuses(node: Node) -> str | None:
    """None if the node has a place in expressions, else the reason why not."""
    for value in (*node.inputs, *node.outputs):
        if value.dtype not in DTYPES:
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
        if value.dtype not in DTYPES:
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
            if node.name in _EITHER_ORDER:
                operands = tuple(sorted(operands))
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


def flops(expression: Expression) -> int:
    """A rough count of operations per element, transcendental functions weighted by their polynomials."""
    return sum(EXPENSIVE.get(i[0], 1) for i in expression[1] if i[0] != "constant")


def name(expression: Expression, limit: int = 4) -> str:
    """What is in the expression, such as `add_relu`."""
    names = [i[0] for i in expression[1] if i[0] != "constant"]
    return "_".join(names[:limit]) + ("_etc" if len(names) > limit else "")
