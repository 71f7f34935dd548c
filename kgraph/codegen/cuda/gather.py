"""Reads at run-time indices: take, take_along_axis, gather_nd. A thread an element.

Neighbouring threads read neighbouring elements of the row that an index stands for (an embedding is the plain case),
and one index is read by all of them at once. A negative index counts from the end, once; what is still out of range is
clamped, or follows the mode of `take`. No index reads outside of the source.
"""

from __future__ import annotations

from collections.abc import Sequence

from kgraph.codegen.cuda.assemble import load_index
from kgraph.codegen.cuda.source import KernelSource, index_type
from kgraph.codegen.kernel import KernelCall, KernelSpec, Launch
from kgraph.codegen.strided import FILL_BITS, collapse_streams, dense_strides, word
from kgraph.ir import Dim, Node
from kgraph.ir.dims import ceil_div, product

_HERE = "kgraph.codegen.cuda.gather"


def accepts(node: Node) -> str | None:
    """None where `lower` takes the node, else why not."""
    if node.name not in _LOWERINGS:
        return f"{node.name} is no gather"
    if node.name == "take" and node.attrs["mode"] == "fill" and node.output.dtype not in FILL_BITS:
        return f"take has no fill value for {node.output.dtype}"
    return None


def lower(node: Node, target) -> list[KernelCall]:
    """The call that computes `node`."""
    template, params, sizes = _LOWERINGS[node.name](node)
    x, indices = node.inputs
    out = node.output
    index = index_type([v.type.size for v in (x, indices, out)])
    return [
        KernelCall(
            KernelSpec(node.name, f"{_HERE}:{template}", (word(x.type), indices.dtype, *params, index)),
            [x, indices, out],
            outputs=1,
            sizes=sizes,
            extent=ceil_div(out.type.size, target.block),
            flops=0,
            bytes=out.type.nbytes * 2 + indices.type.nbytes,
            launch=Launch(target.block),
        )
    ]


def from_end(k: KernelSource, index: str, size: str) -> str:
    """A negative int64 index counted from the end, once, in a variable."""
    return k.let(f"({index} + int64({size}) if {index} < int64(0) else {index})", "at")


def checked_index(k: KernelSource, index: str, size: str, mode: str = "clip") -> str:
    """An int64 index brought into [0, size) by a mode; for "fill" it is counted from the end and left unchecked."""
    if mode == "wrap":
        return k.let(f"({index} % int64({size}))", "at")  # never negative
    index = from_end(k, index, size)
    return index if mode == "fill" else k.let(f"max(int64(0), min({index}, int64({size}) - int64(1)))", "at")


def _is_one(size) -> bool:
    return not isinstance(size, Dim) and size == 1


# -- take -------------------------------------------------------------------------------------------------------------
def _lower_take(node: Node) -> tuple[str, tuple, list]:
    x, indices = node.inputs
    axis, mode = node.attrs["axis"], node.attrs["mode"]
    outer, n, row = product(x.shape[:axis]), x.shape[axis], product(x.shape[axis + 1 :])
    fill = FILL_BITS[x.dtype] if mode == "fill" else None
    return "render_take", (mode, fill, _is_one(outer), _is_one(row)), [outer, n, row, indices.type.size]


def render_take(params: tuple, target) -> str:
    """x[outer, n, row], indices[count] -> [outer, count, row]; whether there is one outer one, and rows of one."""
    dtype, index_dtype, mode, fill, one_outer, one_wide, index = params
    k = KernelSource("take", target, target.block, index)
    x, indices, out = k.operand(dtype), k.operand(index_dtype), k.operand(dtype)
    outer, n, row, count = (k.size() for _ in range(4))
    total = k.let(k.mul(k.mul(outer, count), row), "total")
    with k.grid_stride(total) as i:
        number = i if one_wide else k.let(k.div(i, row))
        which = number if one_outer else k.let(k.mod(number, count))
        at = checked_index(k, load_index(k, indices, which), n, mode)
        place = k.i(at) if one_outer else k.add(k.mul(k.div(number, count), n), k.i(at))
        if not one_wide:
            place = k.add(k.mul(place, row), k.mod(i, row))
        if mode != "fill":
            k.store(out, i, k.load(x, place))
        else:
            with k.suite(f"if {at} >= int64(0) and {at} < int64({n}):"):
                k.store(out, i, k.load(x, place))
            with k.suite("else:"):
                k.store(out, i, k.literal(fill, dtype))
    return k.text()


# -- take_along_axis --------------------------------------------------------------------------------------------------
def _lower_along(node: Node) -> tuple[str, tuple, list]:
    x, indices = node.inputs
    axis, out = node.attrs["axis"], node.output
    axes = []
    strides = zip(dense_strides(x.shape), dense_strides(indices.shape), strict=True)
    for number, (size, (own, of_index)) in enumerate(zip(out.shape, strides, strict=True)):
        own = 0 if number == axis or _is_one(x.shape[number]) else own
        axes.append((size, (own, 0 if _is_one(indices.shape[number]) else of_index)))
    axes = collapse_streams(axes) or [(1, (0, 0))]
    sizes = [v for size, (own, of_index) in axes for v in (size, own, of_index)]
    return "render_along", (len(axes),), [x.shape[axis], dense_strides(x.shape)[axis], *sizes]


def render_along(params: tuple, target) -> str:
    """Axes of the result, each with the strides of x (0 along the indexed axis) and of the indices."""
    dtype, index_dtype, rank, index = params
    k = KernelSource("take_along_axis", target, target.block, index)
    x, indices, out = k.operand(dtype), k.operand(index_dtype), k.operand(dtype)
    n, stride = k.size(), k.size()
    axes = [(k.size(), k.size(), k.size()) for _ in range(rank)]
    sizes = [size for size, _, _ in axes]
    with k.grid_stride(k.let(k.product(sizes), "total")) as i:
        coordinates = k.coordinates(i, sizes)
        row, place = (_dot(k, coordinates, [axis[stream] for axis in axes]) for stream in (1, 2))
        at = checked_index(k, load_index(k, indices, place), n)
        k.store(out, i, k.load(x, k.add(row, k.mul(k.i(at), stride))))
    return k.text()


def _dot(k: KernelSource, coordinates: Sequence[str], strides: Sequence[str]) -> str:
    total = k.i(0)
    for at, stride in zip(coordinates, strides, strict=True):
        total = k.add(total, k.mul(at, stride))
    return total


# -- gather_nd --------------------------------------------------------------------------------------------------------
def _lower_gather_nd(node: Node) -> tuple[str, tuple, list]:
    x, indices = node.inputs
    depth = indices.shape[-1]
    return "render_gather_nd", (depth,), [product(indices.shape[:-1]), product(x.shape[depth:]), *x.shape[:depth]]


def render_gather_nd(params: tuple, target) -> str:
    """x[sizes..., row], index tuples [count, depth] -> [count, row]."""
    dtype, index_dtype, depth, index = params
    k = KernelSource("gather_nd", target, target.block, index)
    x, indices, out = k.operand(dtype), k.operand(index_dtype), k.operand(dtype)
    count, row = k.size(), k.size()
    sizes = [k.size() for _ in range(depth)]
    with k.grid_stride(k.let(k.mul(count, row), "total")) as i:
        number = k.let(k.div(i, row))
        places = []
        for component, size in enumerate(sizes):
            at = load_index(k, indices, k.add(k.mul(number, depth), component))
            places.append(k.i(checked_index(k, at, size)))
        first = k.offset(places, sizes, [True] * depth)
        k.store(out, i, k.load(x, k.add(k.mul(first, row), k.mod(i, row))))
    return k.text()


_LOWERINGS = {"take": _lower_take, "take_along_axis": _lower_along, "gather_nd": _lower_gather_nd}
