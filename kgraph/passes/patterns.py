"""Small questions about values that several passes ask."""

from __future__ import annotations

from kgraph.ir import PRIMITIVES, Graph, Value, constant_value
from kgraph.ir.dims import evaluate, product
from kgraph.ir.primitive import Primitive
from kgraph.ir.recorder import uniform_value


def primitive(name: str) -> Primitive:
    """The record called `name`."""
    return PRIMITIVES[name]


def made_by(value: Value, name: str) -> bool:
    """Whether `value` is a result of a node of that primitive."""
    return value.node is not None and value.node.primitive.name == name


def is_elementwise(node) -> bool:
    """Whether a node computes each element of its result from the same element of its operands."""
    return "elementwise" in node.primitive.traits


# Elementwise operations of an instruction or two.
CHEAP = frozenset(
    "abs add bitwise_and convert eq ge gt le logical_and logical_not logical_or lt maximum minimum mul ne neg relu "
    "relu6 select sub".split()
)


def is_outer_operation(node) -> bool:
    """Whether a cheap elementwise node combines smaller operands, such as a scale for each row and one for each column:
    where its result is read, it takes less to compute it than to read it."""
    return (
        node.name in CHEAP
        and is_elementwise(node)
        and len(node.outputs) == 1
        and len(node.inputs) > 1
        and all(v.shape != node.output.shape for v in node.inputs)
    )


def is_positional(node) -> bool:
    """Whether each element of a node's result is a function of its position, given operands of other shapes."""
    return node.primitive.name == "random_words"


# What a symbolic size is taken for in estimates.
ASSUMED_SIZE = 256


def estimated_elements(shape: tuple) -> int:
    """The number of elements of a shape, its symbols taken for ASSUMED_SIZE."""
    size = product(shape)
    return size if isinstance(size, int) else evaluate(size, dict.fromkeys(size.symbols(), ASSUMED_SIZE))


def scalar_constant(value: Value):
    """The Python scalar of a constant in which all elements are equal, else None.

    Reals compare bit for bit: -0.0 is not 0.0.
    """
    array = constant_value(value)
    if array is None and made_by(value, "full"):
        return value.producer.attrs["value"]
    if array is None and (made_by(value, "broadcast_to") or made_by(value, "reshape")):
        return scalar_constant(value.producer.inputs[0])
    if array is None or array.size == 0 or array.dtype.kind == "V":
        return None
    if array.dtype.kind in "biuf":
        return uniform_value(array)
    first = array.reshape(-1)[0]
    if array.size > 1 and not (array == first).all():
        return None
    return first.item()


def state_only_values(graph: Graph) -> set[Value]:
    """Values that depend on parameters and constants alone: they may be computed before a call.

    Random and control-flow nodes stay out, and so does what depends on a symbolic size.
    """
    known: set[Value] = set(graph.params)
    for node in graph.nodes:
        if node.primitive.traits & {"random", "control"}:
            continue
        if not all(o.type.is_static for o in node.outputs) or node.primitive.name == "dim_value":
            continue
        if all(v in known for v in node.inputs):
            known.update(node.outputs)
    return known


def is_channel_vector(shape: tuple, output_shape: tuple) -> bool:
    """Whether an operand varies only along the last axis of the output it broadcasts to."""
    if not shape or len(shape) > len(output_shape):
        return False
    return shape[-1] == output_shape[-1] and all(s == 1 for s in shape[:-1])
