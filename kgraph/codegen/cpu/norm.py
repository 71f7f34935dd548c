"""layer_norm, rms_norm, group_norm and batch_norm (inference form), alone or in fused nodes of kind "norm".

Statistics take two passes over a row that is kept close: first the mean, then the means of differences from it and of
their squares. What is left of the differences corrects both statistics (Chan, Golub, LeVeque, "Algorithms for computing
the sample variance", 1983): the error of a long sum would be large beside a small deviation.
"""

from __future__ import annotations

from kgraph.codegen.cpu import loop, rows
from kgraph.codegen.cpu import vector_math as vm
from kgraph.codegen.kernel import KernelCall
from kgraph.codegen.normalisations import in_groups, lower_batch_norm, take_apart_norm
from kgraph.ir import Node

MOST_GROUP_VECTORS = 4  # vectors of channels in a group up to which a strip covers whole groups
TEMPLATE = "kgraph.codegen.cpu.norm:render"


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
    return rows.lower_parts(in_groups(parts), TEMPLATE, ("group_norm", epsilon, 1), target, "group_norm")


def accepts(node: Node) -> str | None:
    """None where the node is a normalisation with scalar code around it."""
    if node.name == "batch_norm":
        return None
    parts = take_apart_norm(node)
    return parts if isinstance(parts, str) else None


def lower(node: Node, target) -> list[KernelCall]:
    """One kernel call (two for batch_norm); a unit is a row, or a strip of rows where the last axis is kept."""
    if node.name == "batch_norm":
        return lower_batch_norm(node, loop.lower_expression, target)
    parts = take_apart_norm(node)
    if isinstance(parts, str):
        raise ValueError(f"{node.name}: {parts}")
    if parts.core.name == "group_norm":
        return _lower_group_norm(parts, target)
    algorithm = (parts.core.name, parts.core.attrs["epsilon"], 1)
    return rows.lower_parts(parts, TEMPLATE, algorithm, target, parts.core.name, registers=16)


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

        def difference(value, spot):
            rough = b.sub(value, means[spot.column])
            return value, (square(rough), rough)

        squares, differences = k.again(difference, ("sum", "sum"))
        left = [b.mul(t, share) for t in _fold(k, differences, group)]
        centre = lambda value, spot: b.sub(b.sub(value, means[spot.column]), left[spot.column])
        variances = [b.sub(b.mul(s, share), square(d)) for s, d in zip(_fold(k, squares, group), left)]
        variances = [b.select(b.compare("<", v, 0.0), b.constant_of(v.type, 0.0), v) for v in variances]
    else:
        centre = lambda value, spot: value
        (squares,) = k.read(("sum",), square)
        variances = [b.mul(s, share) for s in _fold(k, squares, group)]
    inverse = [b.div(1.0, vm.sqrt(b, b.add(v, epsilon))) for v in variances]
    k.write(lambda value, spot: b.mul(centre(value, spot), inverse[spot.column]))
