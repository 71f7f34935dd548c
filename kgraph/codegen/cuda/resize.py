"""Resampling of images. Each changed axis maps by a band matrix, whose starts and weights are constants of the plan.

Few taps are summed over all changed axes at once; where they are many, the axes are passes of their own. A thread reads
the taps of one position and sums with them at some places along an axis that does not change, of channels or of images.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from kgraph.codegen.cuda.source import KernelSource, Operand, index_type
from kgraph.codegen.cuda.strips import THREADS, at_least_1
from kgraph.codegen.expressions import DTYPES, compute_dtype
from kgraph.codegen.kernel import KernelCall, KernelSpec, Launch, Temporary
from kgraph.ir import PRIMITIVES, Dim, Node, TensorType, Value, make_node, np_dtype
from kgraph.ir.dims import ceil_div, product
from kgraph.ops.resize import band, nearest_indices

MOST_TAPS = 16  # of an element in one pass, and of a thread in registers
SHARING = (8, 4, 2, 1)  # elements of a thread whose taps are in registers
FEW = 32  # channels, below which places along their axis lie in too few sectors of memory
TEMPLATE = "kgraph.codegen.cuda.resize:render_resize"


def accepts(node: Node) -> str | None:
    """None where `lower` takes the node, else why not."""
    if node.name != "resize":
        return f"{node.name} is no resize"
    x, out = node.inputs[0], node.output
    if any(isinstance(n, Dim) for n in (*x.shape[1:-1], *out.shape[1:-1])):
        return "symbolic image sizes"
    if any(n == 0 for n in x.shape[1:-1]):
        return "an empty image"
    if x.dtype not in DTYPES:
        return f"no resize kernel for {x.dtype}"
    return None


def lower(node: Node, target) -> list[KernelCall]:
    """One call, or one for each changed axis; see the module's docstring."""
    x, out = node.inputs[0], node.output
    method, antialias = node.attrs["method"], bool(node.attrs["antialias"])
    compute = compute_dtype(x.dtype)
    changed = [n for n in range(1, x.type.rank - 1) if x.shape[n] != out.shape[n]]
    if method == "nearest":
        places = {n: [_constant(nearest_indices(x.shape[n], out.shape[n]), "int32")] for n in changed}
        return [_call(x, out, places, "nearest", target)]
    bands = {n: band(x.shape[n], out.shape[n], method, antialias) for n in changed}
    tables = {n: [_constant(first, "int32"), _constant(weights, compute)] for n, (first, weights) in bands.items()}
    if product([weights.shape[1] for _, weights in bands.values()]) <= MOST_TAPS:
        return [_call(x, out, tables, method, target)]
    calls: list[KernelCall] = []
    source: Value | Temporary = x
    for n in changed:
        shape = (*source.type.shape[:n], out.shape[n], *source.type.shape[n + 1 :])
        result = out if n == changed[-1] else Temporary(TensorType(shape, compute))
        calls.append(_call(source, result, {n: tables[n]}, method, target))
        source = result
    return calls


def _constant(table: np.ndarray, dtype: str) -> Value:
    """A table as an operand."""
    return make_node(PRIMITIVES["constant"], [], {"value": table.astype(np_dtype(dtype))}).output


def _call(source, result, tables: dict[int, list[Value]], method: str, target) -> KernelCall:
    """The call that resamples the axes of `tables`: (places,) for the nearest, else (first taps, weights)."""
    shape, out_shape = source.type.shape, result.type.shape
    sizes: list = []
    sizes_after: list = []
    roles, taps, axis = "", 1, 0
    while axis < len(shape):
        if axis in tables:
            width = tables[axis][1].shape[1] if len(tables[axis]) > 1 else 1
            taps *= width
            sizes += [shape[axis], out_shape[axis], width]
            sizes_after.append(out_shape[axis])
            roles += "c"
            axis += 1
            continue
        end = next((n for n in sorted(tables) if n > axis), len(shape))
        sizes.append(product(shape[axis:end]))
        sizes_after.append(sizes[-1])
        roles += "k"
        axis = end
    widths = tuple(table[1].type.shape[1] if len(table) > 1 else 1 for _, table in sorted(tables.items()))
    shared_axis, shared = _share(roles, sizes_after, target) if taps <= MOST_TAPS else (0, 1)
    name = f"resize_{method}"
    operands = [source, *(table for n in sorted(tables) for table in tables[n]), result]
    params = (
        name,
        roles,
        widths if taps <= MOST_TAPS else None,
        (shared_axis, shared),
        source.type.dtype,
        result.type.dtype,
        index_type([source.type.size, result.type.size]),
    )
    threads = product([ceil_div(n, shared) if m == shared_axis else n for m, n in enumerate(sizes_after)])
    return KernelCall(
        KernelSpec(name, TEMPLATE, params),
        operands,
        outputs=1,
        sizes=sizes,
        extent=ceil_div(threads, target.block),
        flops=result.type.size * (2 * taps),
        bytes=source.type.nbytes + result.type.nbytes,
        launch=Launch(target.block),
    )


def _share(roles: str, sizes: Sequence, target) -> tuple[int, int]:
    """(axis, places) of a thread along one of the merged axes. Sizes that are not known count as many."""
    many = lambda n, least: isinstance(n, Dim) or n >= least
    for axis in (len(roles) - 1, 0):
        if roles[axis] == "k" and many(sizes[axis], FEW if axis else 4):
            rest = product([n for m, n in enumerate(sizes) if m != axis])
            threads = [ceil_div(sizes[axis], places) * rest for places in SHARING]
            fits = (n for n, busy in zip(SHARING, threads) if many(busy, THREADS * target.num_sms))
            return axis, next(fits, 1)
    return 0, 1


def render_resize(params: tuple, target) -> str:
    """roles: of the merged axes, "k" kept, "c" changed. widths: taps along each changed axis, None where they are too
    many for registers. sharing: (axis, places of a thread along it)."""
    name, roles, widths, sharing, dtype, out_dtype, index = params
    nearest, compute = name == "resize_nearest", compute_dtype(dtype)
    k = KernelSource(name, target, target.block, index)
    x = k.operand(dtype)
    dtypes = ("int32",) if nearest else ("int32", compute)
    tables = [[k.operand(d) for d in dtypes] if role == "c" else [] for role in roles]
    out = k.operand(out_dtype)
    before, after, run_time_widths = [], [], []
    for role in roles:
        before.append(k.size())
        after.append(k.size() if role == "c" else before[-1])
        run_time_widths.append(k.size() if role == "c" else "")
    changed = [n for n, role in enumerate(roles) if role == "c"]
    spanned = [True] * len(roles)
    axis, shared = sharing
    threads = list(after)
    if shared > 1:
        threads[axis] = k.let(k.ceil_div(after[axis], shared), "places")
    total = k.let(k.product(threads), "total")
    threads = [at_least_1(k, n) for n in threads]
    taps = _Taps(k, widths, compute) if widths and not nearest else None
    values = k.local(dtype, shared)
    with k.grid_stride(total) as i:
        positions = k.coordinates(i, threads)
        places = list(positions)
        for n in changed:
            places[n] = k.let(k.i(k.load(tables[n][0], positions[n])), "place")
        if taps is not None:
            taps.read([tables[n][1] for n in changed], [positions[n] for n in changed], changed, before)
        source = k.let(k.offset(places, before, spanned), "source")
        to = k.let(k.offset(positions, after, spanned), "to")
        rest = k.let(k.sub(after[axis], positions[axis]), "rest")
        source_pitch, pitch = (k.let(k.product(sizes[axis + 1 :]), "pitch") for sizes in (before, after))
        # All are read before one is written: loads cannot pass stores.
        with k.range(0, k.i(shared), 1) as member:
            ahead = k.let(k.mul(member, threads[axis]), "ahead")
            ahead = k.let(f"({ahead} if {ahead} < {rest} else {k.i(0)})", "ahead") if shared > 1 else ahead
            at = k.let(k.add(source, k.mul(ahead, source_pitch)), "at")
            if nearest or not changed:
                value = k.load(x, at)
            elif taps is not None:
                value = taps.sum(x, at)
            else:
                places[axis] = k.let(k.add(places[axis], ahead), "place")
                value = _sum(k, x, tables, positions, places, before, run_time_widths, changed)
            k.store(values, member, value)
        with k.range(0, k.i(shared), 1) as member:
            ahead = k.let(k.mul(member, threads[axis]), "ahead")
            with k.suite(f"if {ahead} < {rest}:"):
                k.store(out, k.add(to, k.mul(ahead, pitch)), k.load(values, member))
    return k.text()


class _Taps:
    """The taps of a position along all changed axes, in registers. widths: how many there are along each."""

    def __init__(self, k: KernelSource, widths: Sequence[int], compute: str):
        self.k, self.widths, self.compute = k, widths, compute
        self.weights, self.aheads = k.local(compute, product(widths)), k.local(k.index, product(widths))

    def read(self, tables: Sequence[Operand], positions: Sequence[str], axes: Sequence[int], sizes: Sequence[str]):
        """axes: the numbers of the changed ones of those of `sizes`."""
        k = self.k
        number = weight = ahead = ""
        with ExitStack() as loops:
            for table, position, axis, width in zip(tables, positions, axes, self.widths, strict=True):
                tap = loops.enter_context(k.range(0, k.i(width), 1))
                own = k.load(table, k.add(k.mul(position, width), tap))
                weight = k.let(f"({weight} * {own})", "weight") if weight else own
                further = k.mul(tap, k.product(sizes[axis + 1 :]))
                ahead = k.let(k.add(ahead, further) if ahead else further, "ahead")
                number = k.let(k.add(k.mul(number, width), tap) if number else tap)
            k.store(self.weights, number, weight)
            k.store(self.aheads, number, ahead)

    def sum(self, x: Operand, source: str) -> str:
        """Of the elements that the taps meet from `source` on."""
        k, total = self.k, self.k.fresh("sum")
        k.line(f"{total} = {k.literal(0, self.compute)}")
        with k.range(0, k.i(product(self.widths)), 1) as n:
            value = k.load(x, k.add(source, k.load(self.aheads, n)))
            k.line(f"{total} = {total} + {k.load(self.weights, n)} * {value}")
        return total


def _sum(
    k: KernelSource,
    x: Operand,
    tables: Sequence,
    positions: Sequence[str],
    places: Sequence[str],
    sizes: Sequence[str],
    widths: Sequence[str],
    changed: Sequence[int],
) -> str:
    """The sum of the weighted taps along all changed axes, each of which is read where it is needed."""
    weight, places, total = "", [*places], k.fresh("sum")
    k.line(f"{total} = {k.literal(0, tables[changed[0]][1].dtype)}")
    with ExitStack() as loops:
        for n in changed:
            tap = loops.enter_context(k.range(0, widths[n], 1))
            own = k.load(tables[n][1], k.add(k.mul(positions[n], widths[n]), tap))
            weight = k.let(f"({weight} * {own})", "weight") if weight else own
            places[n] = k.let(k.add(places[n], tap), "place")
        value = k.load(x, k.offset(places, sizes, [True] * len(sizes)))
        k.line(f"{total} = {total} + {weight} * {value}")
    return total
