"""Resampling of images. Each changed axis maps by a band matrix, whose starts and weights are constants of the plan.

A thread has one element of the result. Few taps are summed over all changed axes at once; where they are many, the axes
are passes of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from kgraph.codegen.cuda.source import KernelSource, index_type
from kgraph.codegen.expressions import DTYPES, compute_dtype
from kgraph.codegen.kernel import KernelCall, KernelSpec, Launch, Temporary
from kgraph.ir import PRIMITIVES, Dim, Node, TensorType, Value, make_node, np_dtype
from kgraph.ir.dims import ceil_div, product
from kgraph.ops.resize import band, nearest_indices

MOST_TAPS = 16  # of an element in one pass
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
    roles, taps, axis = "", 1, 0
    while axis < len(shape):
        if axis in tables:
            width = tables[axis][1].shape[1] if len(tables[axis]) > 1 else 1
            taps *= width
            sizes += [shape[axis], out_shape[axis], width]
            roles += "c"
            axis += 1
            continue
        end = next((n for n in sorted(tables) if n > axis), len(shape))
        sizes.append(product(shape[axis:end]))
        roles += "k"
        axis = end
    name = f"resize_{method}"
    operands = [source, *(table for n in sorted(tables) for table in tables[n]), result]
    params = (
        name,
        roles,
        source.type.dtype,
        result.type.dtype,
        index_type([source.type.size, result.type.size]),
    )
    return KernelCall(
        KernelSpec(name, TEMPLATE, params),
        operands,
        outputs=1,
        sizes=sizes,
        extent=ceil_div(result.type.size, target.block),
        flops=result.type.size * (2 * taps),
        bytes=source.type.nbytes + result.type.nbytes,
        launch=Launch(target.block),
    )


def render_resize(params: tuple, target) -> str:
    """roles: of the merged axes, "k" kept, "c" changed."""
    name, roles, dtype, out_dtype, index = params
    nearest, compute = name == "resize_nearest", compute_dtype(dtype)
    k = KernelSource(name, target, target.block, index)
    x = k.operand(dtype)
    dtypes = ("int32",) if nearest else ("int32", compute)
    tables = [[k.operand(d) for d in dtypes] if role == "c" else [] for role in roles]
    out = k.operand(out_dtype)
    before, after, widths = [], [], []
    for role in roles:
        before.append(k.size())
        after.append(k.size() if role == "c" else before[-1])
        widths.append(k.size() if role == "c" else "")
    with k.grid_stride(k.let(k.product(after), "total")) as i:
        positions = k.coordinates(i, after)
        changed = [n for n, role in enumerate(roles) if role == "c"]
        places = list(positions)
        for n in changed:
            places[n] = k.let(k.i(k.load(tables[n][0], positions[n])), "place")
        if nearest or not changed:
            k.store(out, i, k.load(x, k.offset(places, before, [True] * len(roles))))
        else:
            total = k.fresh("sum")
            k.line(f"{total} = {k.literal(0, compute)}")
            with ExitStack() as loops:
                _sum(k, loops, total, x, tables, positions, places, before, widths, changed)
            k.store(out, i, total)
    return k.text()


def _sum(
    k: KernelSource,
    loops: ExitStack,
    total: str,
    x,
    tables: Sequence,
    positions: Sequence[str],
    places: list[str],
    sizes: Sequence[str],
    widths: Sequence[str],
    changed: Sequence[int],
) -> None:
    """Adds the weighted taps along all changed axes."""
    weight = ""
    for n in changed:
        tap = loops.enter_context(k.range(0, widths[n], 1))
        own = k.load(tables[n][1], k.add(k.mul(positions[n], widths[n]), tap))
        weight = k.let(f"({weight} * {own})", "weight") if weight else own
        places[n] = k.let(k.add(places[n], tap), "place")
    value = k.load(x, k.offset(places, sizes, [True] * len(sizes)))
    k.line(f"{total} = {total} + {weight} * {value}")
