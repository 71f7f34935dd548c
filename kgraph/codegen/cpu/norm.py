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
MOST_GROUP_VECTORS = 4  # vectors of channels in a group up to which a strip covers whole groups
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


def _is_group_norm(node: Node) -> bool:
    return any(n.name == "group_norm" for n in regions.body_of(node)[2])


def _take_apart(node: Node) -> rows.Parts | str:
    if _is_group_norm(node):
        spatial = lambda core: tuple(range(1, len(core.inputs[0].shape) - 1))
        return rows.take_apart(node, ("group_norm",), spatial, _affine)
    return rows.take_apart(node, ROW_CORES, _axes, _affine)


def _lower_group_norm(parts: rows.Parts, target) -> list[KernelCall]:
    """Vectors run along the channels, and statistics of neighbouring channels are folded, where a group is a power of
    two of channels up to a few vectors; else each group of each sample is a row of its own, in short pieces."""
    groups, channels = parts.core.attrs["groups"], parts.shape[-1]
    size = channels // groups
    epsilon = parts.core.attrs["epsilon"]
    widest = target.lanes("float64" if parts.core.output.dtype == "float64" else "float32")
    if isinstance(size, int) and size & (size - 1) == 0 and 1 <= size <= widest * MOST_GROUP_VECTORS:
        strip = lambda lanes: max(rows.STRIP, size // lanes)
        return rows.lower_parts(parts, TEMPLATE, ("group_norm", epsilon, size), target, "group_norm", strip_of=strip)
    rank = len(parts.shape)
    split = lambda leaves: [Leaf(x.value, x.dtype, (*x.spans, x.spans[-1])) for x in leaves]
    parts.shape = (*parts.shape[:-1], groups, size)
    parts.axes = (*range(1, rank - 1), rank)
    parts.leaves, parts.extras = split(parts.leaves), split(parts.extras)
    return rows.lower_parts(parts, TEMPLATE, ("group_norm", epsilon, 1), target, "group_norm")


def accepts(node: Node) -> str | None:
    """None where the node is a normalisation with scalar code around it."""
    if node.name == "batch_norm":
        return None
    parts = _take_apart(node)
    if isinstance(parts, str):
        return parts
    channel_numbers = any(x.is_coordinate and x.spans[-1] for x in (*parts.leaves, *parts.extras))
    return "channel numbers in a fused group_norm" if _is_group_norm(node) and channel_numbers else None


def lower(node: Node, target) -> list[KernelCall]:
    """One kernel call (two for batch_norm); a unit is a row, or a strip of rows where the last axis is kept."""
    if node.name == "batch_norm":
        return _lower_batch_norm(node, target)
    parts = _take_apart(node)
    if isinstance(parts, str):
        raise ValueError(f"{node.name}: {parts}")
    if parts.core.name == "group_norm":
        return _lower_group_norm(parts, target)
    algorithm = (parts.core.name, parts.core.attrs["epsilon"], 1)
    return rows.lower_parts(parts, TEMPLATE, algorithm, target, parts.core.name, registers=16)


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
    core, epsilon, group = kernel.algorithm
    centred = core != "rms_norm"
    return kernel.for_each_row(lambda k: _normalise(k, centred, epsilon, group))


def _fold(k: rows.RowKernel, sums: list, group: int) -> list:
    """Sums over groups of `group` neighbouring lanes of the strip, in every lane of the group."""
    b = k.b
    step = 1
    while step < min(group, k.lanes):
        turned = [[lane ^ step for lane in range(k.lanes)]] * len(sums)
        sums = [b.add(s, b.shuffle(s, None, order)) for s, order in zip(sums, turned)]
        step *= 2
    vectors = max(1, group // k.lanes)
    out = []
    for first in range(0, len(sums), vectors):
        total = sums[first]
        for other in sums[first + 1 : first + vectors]:
            total = b.add(total, other)
        out += [total] * vectors
    return out


def _normalise(k: rows.RowKernel, centred: bool, epsilon: float, group: int) -> None:
    """group: how many neighbouring rows of an outer kernel share their statistics."""
    b = k.b
    share = b.div(1.0 / group, k.row_length())
    square = lambda value: b.mul(value, value)
    if centred:
        (total,) = k.read(("sum",))
        means = [b.mul(t, share) for t in _fold(k, total, group)]
        centre = lambda value, spot: b.sub(value, means[spot.column])
        (squares,) = k.again(lambda value, spot: (value, (square(centre(value, spot)),)), ("sum",))
    else:
        centre = lambda value, spot: value
        (squares,) = k.read(("sum",), square)
    inverse = [b.div(1.0, vm.sqrt(b, b.add(b.mul(s, share), epsilon))) for s in _fold(k, squares, group)]
    k.write(lambda value, spot: b.mul(centre(value, spot), inverse[spot.column]))
