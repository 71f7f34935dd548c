"""What recurrent kernels of all targets share: the structure of a layer, and what its gradient is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from kgraph.codegen.kernel import KernelCall
from kgraph.ir import PRIMITIVES, Dim, Node, TensorType, Value, make_node

GATES = {"lstm": 4, "gru": 3, "simple": 1}
STATES = {"lstm": 2, "gru": 1, "simple": 1}
SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772


class Shape(NamedTuple):
    """Static structure of a kernel; `reverse` has one entry per layer.

    joined: whether the sequences of the layers lie side by side in one result.
    """

    dtype: str
    cell: str
    activation: str
    recurrent_activation: str
    reset_after: bool
    has_mask: bool
    zero_output_for_mask: bool
    features: int
    units: int
    reverse: tuple[bool, ...]
    joined: bool = False

    @property
    def gates(self) -> int:
        return GATES[self.cell]

    @property
    def states(self) -> int:
        return STATES[self.cell]

    @property
    def inputs(self) -> int:
        """Operands per layer."""
        return 5 + self.states + self.has_mask

    @property
    def resets_before(self) -> bool:
        """Whether the reset gate scales the state before it is multiplied, not the product."""
        return self.cell == "gru" and not self.reset_after


def layers_of(node: Node, primitive: str = "rnn") -> list[tuple[Node, tuple[Value, ...], tuple[Value, ...]]]:
    """(rnn node, its operands, its results) for each layer of a plain or fused node; empty where it is neither.

    primitive: "rnn" or "rnn_gradient". Layers whose sequences are concatenated have the whole as their first result
    (`is_joined`).
    """
    if node.name == primitive:
        return [(node, node.inputs, node.outputs)]
    if node.name != "fusion":
        return []
    body = node.attrs["body"]
    outer = dict(zip(body.inputs, node.inputs, strict=True))
    results = dict(zip(body.outputs, node.outputs, strict=True))
    members = list(body.nodes)
    if is_joined(node):
        concatenate = members.pop()
        sequences = [n.outputs[0] for n in members if n.name == "rnn"]
        if list(concatenate.inputs) != sequences or concatenate.attrs["axis"] != 2:
            return []
        results |= dict.fromkeys(sequences, results[concatenate.output])
    layers = []
    for member in members:
        whole = all(v in outer for v in member.inputs) and all(v in results for v in member.outputs)
        if member.name != primitive or not whole:
            return []
        operands = tuple(outer[v] for v in member.inputs)
        layers.append((member, operands, tuple(results[v] for v in member.outputs)))
    return layers


def is_joined(node: Node) -> bool:
    """Whether a fused node of recurrent layers ends with the concatenation of their sequences."""
    members: list[Node] = node.attrs["body"].nodes if node.name == "fusion" else []
    return bool(members) and members[-1].name == "concatenate"


def shape_of(node: Node) -> Shape:
    """The structure of one rnn or rnn_gradient node."""
    attrs = node.attrs
    names = ("cell", "activation", "recurrent_activation", "reset_after", "has_mask", "zero_output_for_mask")
    x, recurrent_kernel = node.inputs[0], node.inputs[2]
    return Shape(
        dtype=x.dtype,
        features=x.shape[2],
        units=recurrent_kernel.shape[0],
        reverse=(bool(attrs["reverse"]),),
        **{n: attrs[n] for n in names},
    )


def unsupported(node: Node, primitive: str = "rnn") -> str | None:
    """Why no kernel takes a plain or fused recurrent node, or gradient of one, or None."""
    layers = layers_of(node, primitive)
    if not layers:
        return f"{node.name} is no {primitive}, nor a group of independent ones"
    shapes = [shape_of(n) for n, _, _ in layers]
    shape = shapes[0]
    if shape.dtype not in ("float32", "float64"):
        return f"no recurrent kernel for {shape.dtype}"
    if isinstance(shape.features, Dim) or isinstance(shape.units, Dim):
        return "symbolic features or units"
    if any(s._replace(reverse=()) != shape._replace(reverse=()) for s in shapes):
        return "recurrent layers of different structure"
    if any(operands[0].shape != layers[0][1][0].shape for _, operands, _ in layers):
        return "recurrent layers over different sizes"
    return None


# -- gradients --------------------------------------------------------------------------------------------------------
class GradientValues(NamedTuple):
    """What back-propagation through time leaves for products over all sequences and steps.

    gates, recurrent_gates: the cotangents of the gates [B, T, G*U] on the side of the input projection and of the
    recurrent product; one value where they are the same. before: the states that the recurrent weights multiply.
    """

    gates: Value
    recurrent_gates: Value
    before: Value


def gradient_values(x: Value, shape: Shape) -> GradientValues:
    """New values for the gradient of a layer over x."""
    batch, steps, _ = x.shape
    width = shape.gates * shape.units
    gates = Value(TensorType((batch, steps, width), shape.dtype))
    # The reset gate of a GRU scales the candidate's cotangent on its way to the recurrent weights, or the state that
    # they multiply. For the latter there are two states a step, and each has the cotangents of the gates that it feeds.
    states = (2,) if shape.resets_before else ()
    is_gru = shape.cell == "gru"
    recurrent_gates = Value(TensorType((batch, steps, *states, width), shape.dtype)) if is_gru else gates
    return GradientValues(gates, recurrent_gates, Value(TensorType((batch, steps, *states, shape.units), shape.dtype)))


def gradient_products(
    inputs: Sequence[Value],
    results: Sequence[Value],
    values: GradientValues,
    lower: Callable[[Node], list[KernelCall]],
    copy: Callable[[Value, Value], list[KernelCall]],
) -> list[KernelCall]:
    """Calls for the cotangents of x, of the weights and of the biases.

    inputs, results: those of an rnn_gradient node. lower, copy: of the target.
    """
    x, kernel = inputs[:2]
    to_x, to_kernel, to_recurrent, to_bias, to_recurrent_bias = results[:5]
    gates, recurrent_gates, before = values
    axes = tuple(range(before.type.rank - 1))
    calls = product_calls(to_x, gates, kernel, (2,), (1,), lower)
    calls += product_calls(to_kernel, x, gates, (0, 1), (0, 1), lower)
    calls += product_calls(to_recurrent, before, recurrent_gates, axes, axes, lower)
    calls += _sum_calls(to_bias, gates, lower)
    if recurrent_gates is gates or len(axes) > 2:
        return calls + copy(to_bias, to_recurrent_bias)
    return calls + _sum_calls(to_recurrent_bias, recurrent_gates, lower)


def product_calls(
    out: Value, lhs: Value, rhs: Value, lhs_contract: tuple, rhs_contract: tuple, lower: Callable
) -> list[KernelCall]:
    """Calls that write the contraction of two values to `out`."""
    attrs = {"lhs_contract": lhs_contract, "rhs_contract": rhs_contract, "lhs_batch": (), "rhs_batch": ()}
    node = make_node(PRIMITIVES["dot_general"], [lhs, rhs], attrs | {"preferred_dtype": None})
    return writing_to(out, node, lower(node))


def _sum_calls(out: Value, x: Value, lower: Callable) -> list[KernelCall]:
    """Calls that write the sum of x over its two leading axes to `out`."""
    node = make_node(PRIMITIVES["reduce_sum"], [x], {"axes": (0, 1), "keepdims": False})
    return writing_to(out, node, lower(node))


def writing_to(out: Value, node: Node, calls: list[KernelCall]) -> list[KernelCall]:
    """The calls of a node, which write `out` in place of its result."""
    for call in calls:
        call.operands = [out if operand is node.output else operand for operand in call.operands]
    return calls
