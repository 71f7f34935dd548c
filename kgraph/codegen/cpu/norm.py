"""layer_norm, rms_norm, group_norm and batch_norm (inference form), alone or in fused nodes of kind "norm".

Statistics take two passes over a row that is kept close: first the mean, then the mean of squared differences from it.
"""

from __future__ import annotations

from kgraph.codegen.cpu import loop, regions, rows
from kgraph.codegen.cpu import vector_math as vm
from kgraph.codegen.cpu.regions import Leaf
from kgraph.codegen.kernel import KernelCall, Temporary
from kgraph.ir import Node, TensorType, Value

ROW_CORES = ("layer_norm", "rms_norm")
TEMPLATE = "kgraph.codegen.cpu.norm:render"


def _axes(core: Node) -> tuple[int, ...]:
    rank = len(core.inputs[0].shape)
    return tuple(sorted(a % rank for a in core.attrs["axes"]))


def _affine(core: Node, parameters: list[Value], rank: int):
    """gamma (and beta) as leaves, and `normalised * gamma + beta` as instructions."""
    dtype = core.output.dtype
    leaves = [Leaf(v, v.dtype, regions.spans_of(v.shape, rank)) for v in parameters]
    instructions = [("mul", (0, 1), (), dtype)]
    if len(parameters) == 2:
        instructions.append(("add", (3, 2), (), dtype))
    return leaves, tuple(instructions)


def _take_apart(node: Node) -> rows.Parts | str:
    _, _, nodes, _ = regions.body_of(node)
    if any(n.name == "group_norm" for n in nodes):
        return _grouped(rows.take_apart(node, ("group_norm",), lambda core: (), _affine))
    return rows.take_apart(node, ROW_CORES, _axes, _affine)


def _grouped(parts: rows.Parts | str) -> rows.Parts | str:
    """The parts of a group_norm with the channel axis split into groups and channels of a group."""
    if isinstance(parts, str):
        return parts
    if any(leaf.is_coordinate and leaf.spans[-1] for leaf in (*parts.leaves, *parts.extras)):
        return "channel numbers in a fused group_norm"
    groups, channels = parts.core.attrs["groups"], parts.shape[-1]
    rank = len(parts.shape)
    split = lambda leaves: [Leaf(x.value, x.dtype, (*x.spans, x.spans[-1])) for x in leaves]
    parts.shape = (*parts.shape[:-1], groups, channels // groups)
    parts.axes = (*range(1, rank - 1), rank)
    parts.leaves, parts.extras = split(parts.leaves), split(parts.extras)
    return parts


def accepts(node: Node) -> str | None:
    """None where the node is a normalisation with scalar code around it."""
    if node.name == "batch_norm":
        return None
    parts = _take_apart(node)
    return parts if isinstance(parts, str) else None


def lower(node: Node, target) -> list[KernelCall]:
    """One kernel call (two for batch_norm); a unit is a row, or a strip of rows where the last axis is kept."""
    if node.name == "batch_norm":
        return _lower_batch_norm(node, target)
    parts = _take_apart(node)
    if isinstance(parts, str):
        raise ValueError(f"{node.name}: {parts}")
    algorithm = (parts.core.name, parts.core.attrs["epsilon"])
    return rows.lower_parts(parts, TEMPLATE, algorithm, target, parts.core.name)


def _lower_batch_norm(node: Node, target) -> list[KernelCall]:
    """`x * scale + shift`, where a first kernel makes scale and shift from the statistics."""
    x, mean, variance, gamma, beta = node.inputs
    dtype, rank, axis = x.dtype, len(x.shape), node.attrs["axis"]
    wide = "float32" if dtype in ("float16", "bfloat16") else dtype
    channels = (x.shape[axis],)
    scale, shift = (Temporary(TensorType(channels, wide)) for _ in range(2))
    statistics = (
        (dtype,) * 4,  # mean, variance, gamma, beta
        (
            ("constant", (), (("value", node.attrs["epsilon"]),), dtype),
            ("add", (1, 4), (), dtype),
            ("sqrt", (5,), (), dtype),
            ("div", (2, 6), (), dtype),
            ("mul", (0, 7), (), dtype),
            ("sub", (3, 8), (), dtype),
        ),
        (7, 9),
    )
    vectors = [Leaf(v, dtype, (True,)) for v in (mean, variance, gamma, beta)]
    first = loop.lower_expression(statistics, vectors, channels, [scale, shift], target)
    affine = ((dtype, wide, wide), (("mul", (0, 1), (), wide), ("add", (3, 2), (), dtype)), (4,))
    channel = tuple(a == axis for a in range(rank))
    leaves = [Leaf(x, dtype, (True,) * rank), Leaf(scale, wide, channel), Leaf(shift, wide, channel)]
    return [*first, *loop.lower_expression(affine, leaves, x.shape, node.outputs, target)]


def render(params: tuple, target) -> str:
    kernel = rows.RowKernel(params, target)
    core, epsilon = kernel.algorithm
    centred = core != "rms_norm"
    return kernel.for_each_row(lambda k: _normalise(k, centred, epsilon))


def _normalise(k: rows.RowKernel, centred: bool, epsilon: float) -> None:
    b = k.b
    share = b.div(1.0, k.row_length())
    square = lambda value, spot: (value, (b.mul(value, value),))
    if centred:
        (total,) = k.read(kinds=("sum",))
        means = [b.mul(t, share) for t in total]

        def deviation(value, spot):
            value = b.sub(value, means[spot.column])
            return value, (b.mul(value, value),)

        (squares,) = k.again(deviation, ("sum",), keep=True)
    else:
        (squares,) = k.read(square, ("sum",))
    inverse = [b.div(1.0, vm.sqrt(b, b.add(b.mul(s, share), epsilon))) for s in squares]
    k.write(lambda value, spot: b.mul(value, inverse[spot.column]))
