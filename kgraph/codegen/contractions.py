"""Taking contractions apart: the product or convolution, and the elementwise epilogue that is fused to it.

The first input of the epilogue's expression is the contraction's own result; every further one is classified by its
shape against the result's, see `operand_kind`. Results are addressed by pixel (all leading axes flattened) and column
(the last axis of a convolution; the free axes of a product's second operand, of which there may be any number).
"""

from __future__ import annotations

from dataclasses import dataclass

from kgraph.codegen import expressions
from kgraph.ir import Dim, Graph, Node, TensorType, Value


def has_products(operand: str) -> bool:
    """Whether there are kernels for products of `operand` elements."""
    return operand in expressions.DTYPES and operand != "bool"


def accumulate_dtype(operand: str, result: str) -> str:
    """The dtype in which products of `operand` elements are summed for a `result`. Raises ValueError without kernel."""
    if operand in ("float16", "bfloat16", "float32"):
        return "float64" if result == "float64" else "float32"
    if operand == "float64":
        return "float64"
    if operand in ("int8", "uint8", "int16", "uint16", "int32", "uint32"):
        return "int64" if result in ("int64", "uint64", "float64") else "int32"
    if operand in ("int64", "uint64"):
        return "int64"
    raise ValueError(f"no kernels for products of {operand}")


def operand_kind(shape: tuple, result: tuple, column_axes: int = 1) -> str | None:
    """How an extra of `shape` addresses a result of shape `result`; None where no kind fits.

    "scalar": one element; "channel": one per column; "row": one per pixel; "full": one per element.
    column_axes: how many of the result's last axes together are the column.
    """
    padded = (1,) * (len(result) - len(shape)) + tuple(shape)
    if len(padded) != len(result):
        return None
    ones = [same_size(s, 1) for s in padded]
    equal = [same_size(s, t) for s, t in zip(padded, result)]
    if all(equal):
        return "full"
    if all(ones):
        return "scalar"
    first = len(result) - column_axes
    if all(equal[first:]) and all(ones[:first]):
        return "channel"
    if all(ones[first:]) and all(equal[:first]):
        return "row"
    return None


def column_axes(core: Node) -> int:
    """How many of the last axes of a contraction's result are its columns."""
    if core.name != "dot_general":
        return 1
    return core.inputs[1].type.rank - len(core.attrs["rhs_contract"]) - len(core.attrs["rhs_batch"])


def same_size(x, y) -> bool:
    """Whether two sizes are equal for every value of their symbols, as far as their canonical forms tell."""
    if isinstance(x, Dim) or isinstance(y, Dim):
        return isinstance(x, Dim) and isinstance(y, Dim) and x.terms == y.terms
    return x == y


@dataclass
class Parts:
    """A contraction node taken apart.

    node: the contraction itself (in the body of a fused node, or the node). operands: values that its two operands
    stand for outside. packed: layout of each operand, or None. extras: (kind, value) of further inputs. outputs: values
    written. expression: of the epilogue, or None.
    """

    node: Node
    operands: tuple[Value, ...]
    packed: tuple
    extras: list[tuple[str, Value]]
    outputs: tuple[Value, ...]
    expression: tuple | None

    @property
    def result(self) -> TensorType:
        return self.node.output.type

    def inplace(self, first_extra: int) -> tuple:
        """(output, input) operand positions of outputs that may overwrite an extra: same element, read before."""
        pairs = []
        for o, out in enumerate(self.outputs):
            for i, (kind, value) in enumerate(self.extras):
                if kind == "full" and value.type.itemsize == out.type.itemsize and value not in self.operands:
                    pairs.append((first_extra + len(self.extras) + o, first_extra + i))
        return tuple(pairs)

    @property
    def name(self) -> str:
        """The epilogue's part of a kernel's name, such as `_add_relu`."""
        name = expressions.name(self.expression) if self.expression is not None else ""
        return f"_{name}" if name else ""


def take_apart(node: Node, primitive: str) -> Parts | str:
    """The parts of a plain `primitive` node or of a fused node around one; a string says why it cannot be done."""
    if node.name == primitive:
        return Parts(node, tuple(node.inputs), (None, None), [], node.outputs, None)
    if node.name != "fusion":
        return f"{node.name} is not {primitive}"
    body: Graph = node.attrs["body"]
    cores = [n for n in body.nodes if n.name == primitive]
    if len(cores) != 1:
        return f"a fused {primitive} kernel needs exactly one {primitive}, not {len(cores)}"
    core = cores[0]
    position = {v: i for i, v in enumerate(body.inputs)}
    if any(v not in position for v in core.inputs):
        return f"the operands of {primitive} are computed inside of the fused node"
    layouts = dict(node.attrs.get("packed", ()))
    packed = tuple(layouts.get(position[v]) for v in core.inputs)
    operands = tuple(node.inputs[position[v]] for v in core.inputs)
    rest = [n for n in body.nodes if n is not core]
    if not rest and tuple(body.outputs) == core.outputs:
        return Parts(core, operands, packed, [], node.outputs, None)
    shape, columns = core.output.shape, column_axes(core)
    extras = []
    used = {v for n in rest for v in n.inputs}
    for value in body.inputs:
        if value not in used:
            continue
        if value in core.inputs and packed[core.inputs.index(value)] is not None:
            return "a packed weight is also read by the epilogue"
        kind = operand_kind(value.shape, shape, columns)
        if kind is None:
            return f"an epilogue operand {value.type} neither spans {core.output.type} nor one of its axes' ends"
        extras.append((kind, value))
    if any(operand_kind(v.shape, shape) != "full" for v in body.outputs):
        return "the epilogue changes the shape"
    expression = expressions.encode_nodes(rest, [core.output, *(v for _, v in extras)], body.outputs)
    if isinstance(expression, str):
        return expression
    outer = [(kind, node.inputs[position[v]]) for kind, v in extras]
    return Parts(core, operands, packed, outer, node.outputs, expression)


class Axes:
    """The axes of a dot_general, contracted ones in an order that suits the first operand."""

    def __init__(self, node: Node):
        lhs, rhs = node.inputs
        self.lhs_batch, self.rhs_batch = tuple(node.attrs["lhs_batch"]), tuple(node.attrs["rhs_batch"])
        pairs = sorted(zip(node.attrs["lhs_contract"], node.attrs["rhs_contract"]))
        self.lhs_contract = tuple(left for left, _ in pairs)
        self.rhs_contract = tuple(right for _, right in pairs)
        self.lhs_free = _others(lhs.type.rank, self.lhs_batch, self.lhs_contract)
        self.rhs_free = _others(rhs.type.rank, self.rhs_batch, self.rhs_contract)


def _others(rank: int, *taken: tuple) -> tuple:
    return tuple(a for a in range(rank) if not any(a in t for t in taken))
