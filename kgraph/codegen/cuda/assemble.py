"""Results put together from pieces: concatenate, pad, pad_mirror, dynamic_update_slice. A thread an element.

pad and dynamic_update_slice are one kernel: a foreground placed on a background that is one value, or an array of the
result's shape.
"""

from __future__ import annotations

from collections.abc import Sequence

from kgraph.codegen.cuda.source import KernelSource, Operand, index_type
from kgraph.codegen.kernel import KernelCall, KernelSpec, Launch
from kgraph.codegen.strided import word
from kgraph.codegen.views import covers, mirror_axes, pad_axes, update_axes
from kgraph.ir import Node
from kgraph.ir.dims import ceil_div, product

_HERE = "kgraph.codegen.cuda.assemble"


def _call(name: str, template: str, params: tuple, operands: Sequence, sizes: Sequence, target) -> KernelCall:
    out = operands[-1]
    index = index_type([v.type.size for v in operands])
    return KernelCall(
        KernelSpec(name, f"{_HERE}:{template}", (name, word(out.type), *params, index)),
        operands,
        outputs=1,
        sizes=sizes,
        extent=ceil_div(out.type.size, target.block),
        flops=0,
        bytes=out.type.nbytes * 2,
        launch=Launch(target.block),
    )


def load_index(k: KernelSource, operand: Operand, at: str) -> str:
    """An index of any integer dtype as int64, in a variable."""
    return k.let(f"int64({k.load(operand, at)})", "at")


def clamped_start(k: KernelSource, operand: Operand, limit: str) -> str:
    """A start that a scalar operand holds, kept inside [0, limit]."""
    return k.i(f"max(int64(0), min({load_index(k, operand, k.i(0))}, int64({limit})))")


# -- concatenate ------------------------------------------------------------------------------------------------------
def _lower_concatenate(node: Node, target) -> KernelCall:
    out = node.output
    axis = node.attrs["axis"] % out.type.rank
    inner = product(out.shape[axis + 1 :])
    pieces = [x.shape[axis] * inner for x in node.inputs]
    sizes = [product(out.shape[:axis]), *pieces]
    return _call("concatenate", "render_concatenate", (len(pieces),), [*node.inputs, out], sizes, target)


def render_concatenate(params: tuple, target) -> str:
    """Rows of the result hold all axes from the concatenated one on: a piece of each operand behind the other."""
    name, dtype, count, index = params
    k = KernelSource(name, target, target.block, index)
    sources, out = [k.operand(dtype) for _ in range(count)], k.operand(dtype)
    outer, *pieces = (k.size() for _ in range(count + 1))
    ends = [pieces[0]]
    for piece in pieces[1:]:
        ends.append(k.let(k.add(ends[-1], piece), "end"))
    with k.grid_stride(k.let(k.mul(outer, ends[-1]), "total")) as i:
        row, at = k.let(k.div(i, ends[-1])), k.let(k.mod(i, ends[-1]))
        for number, (source, piece) in enumerate(zip(sources, pieces, strict=True)):
            start = ends[number - 1] if number else k.i(0)
            test = "else:" if number == count - 1 else f"{'elif' if number else 'if'} {at} < {ends[number]}:"
            with k.suite(test if count > 1 else "if True:"):
                k.store(out, i, k.load(source, k.add(k.mul(row, piece), k.sub(at, start))))
    return k.text()


# -- pad and dynamic_update_slice: a foreground over a background -----------------------------------------------------
def _lower_pad(node: Node, target) -> KernelCall:
    return _lower_overlay("pad", pad_axes(node), [*node.inputs, node.output], False, target)


def _lower_update(node: Node, target) -> KernelCall:
    x, update, *starts = node.inputs
    call = _lower_overlay("dynamic_update_slice", update_axes(node), [update, x, *starts, node.output], True, target)
    call.notes["inplace"] = ((len(call.operands) - 1, 1),)
    return call


def _lower_overlay(name: str, axes: Sequence[tuple], operands: Sequence, is_array: bool, target) -> KernelCall:
    sizes: list = []
    described = []
    for size, own, start, interior in axes:
        is_read = isinstance(start, tuple)
        sizes += [size, own, *(start[2:] if is_read else [start])]
        described.append((covers(size, own, start, interior), start[1] if is_read else 0, interior))
    starts = tuple(v.dtype for v in operands[2:-1])
    return _call(name, "render_overlay", (tuple(described), starts, is_array), operands, sizes, target)


def render_overlay(params: tuple, target) -> str:
    """Axes are (whether the foreground covers it, the operand that holds the start or 0, interior)."""
    name, dtype, axes, starts, is_array, index = params
    k = KernelSource(name, target, target.block, index)
    operands = [k.operand(d) for d in (dtype, dtype, *starts, dtype)]
    foreground, back, out = operands[0], operands[1], operands[-1]
    sizes, owns, firsts = [], [], []
    for _, operand, _ in axes:
        sizes.append(k.size())
        owns.append(k.size())
        if operand:
            limit, scale = k.size(), k.size()
            firsts.append(k.let(k.mul(clamped_start(k, operands[operand], limit), scale), "first"))
        else:
            firsts.append(k.size())
    if not is_array:
        _lay_over(k, axes, foreground, f"{back.name}[{k.i(0)}]", out, sizes, owns, firsts)
        return k.text()
    # Where the result lies where the background lay, that is there already.
    with k.suite(f"if same_place({back.name}, {out.name}):"), k.grid_stride(k.let(k.product(owns), "total")) as i:
        places = [k.add(first, at) for at, first in zip(k.coordinates(i, owns), firsts, strict=True)]
        k.line(f"{out.name}[{k.offset(places, sizes, [True] * len(sizes))}] = {foreground.name}[{i}]")
    with k.suite("else:"):
        _lay_over(k, axes, foreground, f"{back.name}[{{i}}]", out, sizes, owns, firsts)
    return k.text()


def _lay_over(k: KernelSource, axes, foreground: Operand, background: str, out: Operand, sizes, owns, firsts) -> None:
    """Write all elements of the result. background: the source of element `{i}` of it."""
    with k.grid_stride(k.let(k.product(sizes), "total")) as i:
        places, tests = [], []
        for at, own, first, (covered, _, interior) in zip(k.coordinates(i, sizes), owns, firsts, axes, strict=True):
            if covered:
                places.append(at)
                continue
            # Before the foreground the difference wraps (or is negative): a start may be negative, too.
            place = k.let(f"(int64({at}) - int64({_signed(k, first)}))", "place")
            tests.append(f"{place} >= int64(0)")
            if interior:
                tests.append(f"{place} % int64({interior + 1}) == int64(0)")
                place = k.let(f"({place} // int64({interior + 1}))", "place")
            tests.append(f"{place} < int64({own})")
            places.append(k.i(place))
        value = k.fresh("value")
        k.line(f"{value} = {background.format(i=i)}")
        with k.suite(f"if {' and '.join(tests) or 'True'}:"):
            k.line(f"{value} = {foreground.name}[{k.offset(places, owns, [True] * len(owns))}]")
        k.line(f"{out.name}[{i}] = {value}")


def _signed(k: KernelSource, text: str) -> str:
    """An index that may be negative, as a signed number."""
    return f"int32({text})" if k.index == "uint32" else text


# -- pad_mirror -------------------------------------------------------------------------------------------------------
def _lower_mirror(node: Node, target) -> KernelCall:
    axes = mirror_axes(node)
    params = (node.attrs["mode"], tuple(plain for _, _, _, plain in axes))
    sizes = [x for n, m, before, _ in axes for x in (n, m, before)]
    return _call("pad_mirror", "render_mirror", params, [node.inputs[0], node.output], sizes, target)


def render_mirror(params: tuple, target) -> str:
    name, dtype, mode, plain, index = params
    k = KernelSource(name, target, target.block, index)
    source, out = k.operand(dtype), k.operand(dtype)
    axes = [(k.size(), k.size(), k.size()) for _ in plain]
    sizes, owns = [a[0] for a in axes], [a[1] for a in axes]
    with k.grid_stride(k.let(k.product(sizes), "total")) as i:
        places = [
            at if kept else mirrored(k, mode, f"(int64({at}) - int64({before}))", own)
            for at, (_, own, before), kept in zip(k.coordinates(i, sizes), axes, plain, strict=True)
        ]
        k.store(out, i, k.load(source, k.offset(places, owns, [True] * len(owns))))
    return k.text()


def mirrored(k: KernelSource, mode: str, place: str, size: str) -> str:
    """Where position `place` (int64, may lie outside [0, size)) reads from; the conventions are NumPy's."""
    size = k.let(f"int64({size})", "extent")
    if mode == "edge":
        return k.i(f"max(int64(0), min({place}, {size} - int64(1)))")
    period = {"reflect": f"2 * {size} - 2", "symmetric": f"2 * {size}", "wrap": size}[mode]
    period = k.let(f"max(int64(1), int64({period}))", "period")
    rest = k.let(f"({place} % {period})", "rest")  # never negative
    if mode == "wrap":
        return k.i(rest)
    return k.i(f"min({rest}, {period} - {rest}{'' if mode == 'reflect' else ' - int64(1)'})")


LOWERINGS = {
    "concatenate": _lower_concatenate,
    "pad": _lower_pad,
    "pad_mirror": _lower_mirror,
    "dynamic_update_slice": _lower_update,
}

__all__ = ["LOWERINGS", "clamped_start", "load_index"]
