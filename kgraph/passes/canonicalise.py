"""Brings nodes to one form: removes what does nothing, merges chains, lowers batch normalisation to scale and shift."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from kgraph.ir import Graph, Node, Rewriter, TensorType, Value, np_dtype
from kgraph.ir.types import FLOATS, INTS
from kgraph.passes.manager import PassContext
from kgraph.passes.patterns import made_by, primitive, scalar_constant

RULES: dict[str, list] = {}


def rule(*names: str):
    """Register a rewrite for nodes of these primitives; it gives replacement values or None."""

    def add(function):
        for name in names:
            RULES.setdefault(name, []).append(function)
        return function

    return add


def canonicalise(graph: Graph, context: PassContext | None = None) -> Graph:
    """Applies the rules of this file once to every node, operands first."""

    def visit(node: Node, inputs: tuple, rewriter: Rewriter):
        for function in RULES.get(node.primitive.name, ()):
            new = function(node, inputs, rewriter)
            if new is not None:
                return new
        return None

    return Rewriter(graph).run(visit)


def _scalar(rewriter: Rewriter, value, dtype: str) -> Value:
    return rewriter.emit(primitive("constant"), value=np.asarray(value, np_dtype(dtype)))


# -- what does nothing ---------------------------------------------------------------------------------------------
@rule("stop_gradient")
def drop_stop_gradient(node, inputs, rewriter):
    """`stop_gradient(x) -> x`: gradients are taken before this pass."""
    return inputs[0]


@rule("custom_gradient")
def drop_custom_gradient(node, inputs, rewriter):
    """`custom_gradient(y, x, ..; n) -> y`, the first n operands."""
    return inputs[: len(node.outputs)]


@rule("reshape", "broadcast_to")
def drop_same_shape(node, inputs, rewriter):
    """`reshape(x: S; S) -> x`."""
    return inputs[0] if inputs[0].shape == node.output.shape else None


@rule("convert")
def drop_same_dtype(node, inputs, rewriter):
    """`convert(x: T; T) -> x`."""
    return inputs[0] if inputs[0].dtype == node.output.dtype else None


@rule("transpose")
def drop_identity_transpose(node, inputs, rewriter):
    """`transpose(x; 0, 1, ..) -> x`."""
    permutation = node.attrs["permutation"]
    return inputs[0] if tuple(permutation) == tuple(range(len(permutation))) else None


@rule("concatenate")
def drop_single_concatenate(node, inputs, rewriter):
    """`concatenate(x) -> x`."""
    return inputs[0] if len(inputs) == 1 else None


@rule("slice")
def drop_full_slice(node, inputs, rewriter):
    """`slice(x) -> x` where it takes everything in order."""
    full = node.output.shape == inputs[0].shape and all(s == 1 for s in node.attrs["stride"])
    return inputs[0] if full else None


@rule("pad")
def drop_empty_pad(node, inputs, rewriter):
    """`pad(x; 0, 0, 0) -> x`."""
    nothing = all(isinstance(e, int) and e == 0 for key in ("low", "high", "interior") for e in node.attrs[key])
    return inputs[0] if nothing else None


@rule("rev")
def merge_revs(node, inputs, rewriter):
    """`rev(rev(x; a); a) -> x`."""
    if made_by(inputs[0], "rev") and set(inputs[0].node.attrs["axes"]) == set(node.attrs["axes"]):
        return inputs[0].node.inputs[0]
    return None


@rule("rev")
def drop_axes_of_rev(node, inputs, rewriter):
    """`rev(x; axes) -> rev(x; those longer than 1) -> x` where none is left."""
    axes = node.attrs["axes"]
    shape = inputs[0].shape
    kept = tuple(a for a in axes if not (isinstance(shape[a], int) and shape[a] <= 1))
    if not kept:
        return inputs[0]
    return rewriter.emit(node.primitive, inputs[0], axes=kept) if len(kept) < len(axes) else None


# -- chains --------------------------------------------------------------------------------------------------------
@rule("reshape")
def merge_reshapes(node, inputs, rewriter):
    """`reshape(reshape(x)) -> reshape(x)`."""
    if made_by(inputs[0], "reshape"):
        source = inputs[0].node.inputs[0]
        if source.shape == node.output.shape:
            return source
        return rewriter.emit(primitive("reshape"), source, shape=node.output.shape)
    return None


@rule("transpose")
def merge_transposes(node, inputs, rewriter):
    """`transpose(transpose(x; p); q) -> transpose(x; p[q])`."""
    if made_by(inputs[0], "transpose"):
        source = inputs[0].node.inputs[0]
        first = inputs[0].node.attrs["permutation"]
        combined = tuple(first[axis] for axis in node.attrs["permutation"])
        if combined == tuple(range(len(combined))):
            return source
        return rewriter.emit(primitive("transpose"), source, permutation=combined)
    return None


@rule("transpose")
def transpose_to_reshape(node, inputs, rewriter):
    """`transpose(x; p) -> reshape(x)` where only axes of size 1 move."""
    shape = inputs[0].shape
    moved = [axis for axis in node.attrs["permutation"] if not (isinstance(shape[axis], int) and shape[axis] == 1)]
    if moved == sorted(moved):
        return rewriter.emit(primitive("reshape"), inputs[0], shape=node.output.shape)
    return None


_EXACT_WIDENING = {
    ("bool", "int8"), ("float16", "float32"), ("bfloat16", "float32"), ("float32", "float64"), ("int32", "int64"),
}  # fmt: skip


@rule("convert")
def merge_converts(node, inputs, rewriter):
    """`convert(convert(x: T; wider); T) -> x`."""
    if made_by(inputs[0], "convert"):
        source = inputs[0].node.inputs[0]
        if source.dtype == node.output.dtype and (source.dtype, inputs[0].dtype) in _EXACT_WIDENING:
            return source
    return None


# -- arithmetic ----------------------------------------------------------------------------------------------------
def _same_type(value: Value, expected: TensorType) -> bool:
    return value.type == expected


@rule("mul", "div")
def drop_times_one(node, inputs, rewriter):
    """`x * 1 -> x`, `x / 1 -> x`."""
    x, y = inputs
    if scalar_constant(y) == 1 and _same_type(x, node.output.type):
        return x
    if node.name == "mul" and scalar_constant(x) == 1 and _same_type(y, node.output.type):
        return y
    return None


@rule("add", "sub")
def drop_plus_zero(node, inputs, rewriter):
    """`x + 0 -> x`, `x - 0 -> x` (the sign of a zero result is not kept)."""
    x, y = inputs
    if scalar_constant(y) == 0 and _same_type(x, node.output.type):
        return x
    if node.name == "add" and scalar_constant(x) == 0 and _same_type(y, node.output.type):
        return y
    return None


@rule("pow")
def expand_small_powers(node, inputs, rewriter):
    """`x ** 2 -> x * x`, `x ** 3 -> x * x * x`, `x ** 0.5 -> sqrt(x)`, `x ** -0.5 -> rsqrt(x)`, `x ** 1 -> x`."""
    x, y = inputs
    exponent = scalar_constant(y)
    if exponent is None or x.type != node.output.type:
        return None
    if exponent == 1:
        return x
    if exponent == 2:
        return rewriter.emit(primitive("mul"), x, x)
    if exponent == 3:
        return rewriter.emit(primitive("mul"), rewriter.emit(primitive("mul"), x, x), x)
    if x.dtype in FLOATS:
        if exponent == 0.5:
            return rewriter.emit(primitive("sqrt"), x)
        if exponent == -0.5:
            return rewriter.emit(primitive("rsqrt"), x)
        if exponent == -1:
            return rewriter.emit(primitive("div"), _scalar(rewriter, 1, x.dtype), x)
    return None


@rule("neg")
def merge_negations(node, inputs, rewriter):
    """`-(-x) -> x`."""
    return inputs[0].node.inputs[0] if made_by(inputs[0], "neg") else None


@rule("relu")
def merge_relus(node, inputs, rewriter):
    """`relu(relu(x)) -> relu(x)`."""
    return inputs[0] if made_by(inputs[0], "relu") or made_by(inputs[0], "relu6") else None


@rule("maximum")
def maximum_to_relu(node, inputs, rewriter):
    """`maximum(x, 0) -> relu(x)`."""
    x, y = inputs
    if node.output.dtype in FLOATS:
        if scalar_constant(y) == 0 and _same_type(x, node.output.type):
            return rewriter.emit(primitive("relu"), x)
        if scalar_constant(x) == 0 and _same_type(y, node.output.type):
            return rewriter.emit(primitive("relu"), y)
    return None


@rule("select")
def select_of_constant(node, inputs, rewriter):
    """`select(true, x, y) -> x`, `select(false, x, y) -> y`."""
    chosen = scalar_constant(inputs[0])
    if chosen is None:
        return None
    value = inputs[1] if chosen else inputs[2]
    return value if _same_type(value, node.output.type) else None


@rule("logical_and", "logical_or")
def logic_with_constant(node, inputs, rewriter):
    """`x & true -> x`, `x | false -> x`."""
    neutral = node.name == "logical_and"
    for one, other in (inputs, inputs[::-1]):
        if scalar_constant(other) is not None and bool(scalar_constant(other)) == neutral:
            if _same_type(one, node.output.type):
                return one
    return None


# -- broadcasts and constants ---------------------------------------------------------------------------------------
_MAY_SHRINK = {"broadcast_to", "constant", "full", "reshape"}


def _elementwise_operand_rule(node: Node, inputs: tuple, rewriter: Rewriter):
    """Elementwise nodes broadcast by themselves: explicit broadcasts of an operand are dropped, constants with equal
    elements shrink to scalars, where another operand still has the full shape."""
    candidates = [i for i, v in enumerate(inputs) if v.node is not None and v.node.primitive.name in _MAY_SHRINK]
    if not candidates:
        return None
    shape = node.output.shape
    new = list(inputs)
    for i in candidates:
        value = inputs[i]
        if not any(v.shape == shape for j, v in enumerate(new) if j != i):
            continue
        if made_by(value, "broadcast_to"):
            new[i] = value.node.inputs[0]
        elif value.shape and (scalar := scalar_constant(value)) is not None:
            new[i] = _scalar(rewriter, scalar, value.dtype)
    if any(a is not b for a, b in zip(new, inputs)):
        return rewriter.target.add(node.primitive, new, node.provenance, **node.attrs)
    return None


for _name in (
    "add sub mul div maximum minimum pow select eq ne lt le gt ge logical_and logical_or logical_xor mod rem "
    "floor_divide atan2 bitwise_and bitwise_or bitwise_xor"
).split():
    RULES.setdefault(_name, []).append(_elementwise_operand_rule)


@rule("broadcast_to")
def merge_broadcasts(node, inputs, rewriter):
    """`broadcast_to(broadcast_to(x)) -> broadcast_to(x)`."""
    if made_by(inputs[0], "broadcast_to"):
        return rewriter.emit(primitive("broadcast_to"), inputs[0].node.inputs[0], shape=node.output.shape)
    return None


# -- normalisation --------------------------------------------------------------------------------------------------
@rule("batch_norm")
def batch_norm_to_scale_and_shift(node, inputs, rewriter):
    """`batch_norm(x, mean, var, gamma, beta) -> x * scale + shift`, scale and shift from the statistics alone.

    With statistics that are parameters this moves the square root and division out of the call, and lets the scale
    go on into the weights before it.
    """
    x, mean, variance, gamma, beta = inputs
    if x.dtype not in ("float32", "float64"):
        return None
    emit = rewriter.emit
    axis = node.attrs["axis"] % x.type.rank
    epsilon = _scalar(rewriter, node.attrs["epsilon"], variance.dtype)
    scale = emit(primitive("rsqrt"), emit(primitive("add"), variance, epsilon))
    scale = emit(primitive("mul"), scale, gamma)
    shift = emit(primitive("sub"), beta, emit(primitive("mul"), mean, scale))
    if axis != x.type.rank - 1:
        shape = (x.shape[axis],) + (1,) * (x.type.rank - 1 - axis)
        scale = emit(primitive("reshape"), scale, shape=shape)
        shift = emit(primitive("reshape"), shift, shape=shape)
    return emit(primitive("add"), emit(primitive("mul"), x, scale), shift)


@rule("div")
def division_by_constant(node, inputs, rewriter):
    """`x / c -> x * (1 / c)` where 1 / c is exact (c is a power of two), so that nothing is rounded differently."""
    x, y = inputs
    divisor = scalar_constant(y)
    if divisor is None or x.dtype in INTS or isinstance(divisor, complex) or y.shape:
        return None
    if not divisor or not np.isfinite(divisor) or abs(np.frexp(divisor)[0]) != 0.5:
        return None
    limits = ml_dtypes.finfo(y.type.np_dtype)
    if not float(limits.tiny) <= abs(1.0 / divisor) <= float(limits.max):
        return None  # the reciprocal is no normal number of the dtype
    return rewriter.emit(primitive("mul"), x, _scalar(rewriter, 1.0 / divisor, y.dtype))
