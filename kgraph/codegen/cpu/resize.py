"""Resampling of images. Each changed axis maps by a band matrix, whose starts and weights are tables in the kernel.

The last two changed axes are one kernel: a unit is one position of the first of them, whose taps are summed into a row
in scratch, which the second then resamples. Axes ahead of those (volumes) are passes of their own.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir

from kgraph.codegen.cpu.builder import COMPUTE_TYPES, KernelBuilder, Pointer, compute_dtype, itemsize
from kgraph.codegen.cpu.strided import SizeTable, copy_row, resolve, word
from kgraph.codegen.kernel import KernelCall, KernelSpec, Temporary
from kgraph.ir import Dim, Node, TensorType, Value
from kgraph.ir.dims import product
from kgraph.ops.resize import band, nearest_indices

MOST_UNROLLED_TAPS = 8


def accepts(node: Node) -> str | None:
    """None where `lower` takes the node, else why not."""
    if node.name != "resize":
        return f"{node.name} is no resize"
    x, out = node.inputs[0], node.output
    if any(isinstance(n, Dim) for n in (*x.shape[1:-1], *out.shape[1:-1])):
        return "symbolic image sizes"
    if any(n == 0 for n in x.shape[1:-1]):
        return "an empty image"
    if x.dtype not in COMPUTE_TYPES:
        return f"no resize kernel for {x.dtype}"
    return None


def lower(node: Node, target) -> list[KernelCall]:
    """One call for up to two changed axes, and one more for each further one."""
    x, out = node.inputs[0], node.output
    changed = [k for k in range(1, x.type.rank - 1) if x.shape[k] != out.shape[k]]
    method, antialias = node.attrs["method"], bool(node.attrs["antialias"])
    between = x.dtype if method == "nearest" else compute_dtype(x.dtype)
    calls: list[KernelCall] = []
    source: Value | Temporary = x
    while len(changed) > 2:
        axis = changed.pop(0)
        shape = (*source.type.shape[:axis], out.shape[axis], *source.type.shape[axis + 1 :])
        result = Temporary(TensorType(shape, between))
        calls.append(_call(source, result, (axis,), method, antialias, target))
        source = result
    calls.append(_call(source, out, tuple(changed), method, antialias, target))
    return calls


def _call(source, result, axes: tuple, method: str, antialias: bool, target) -> KernelCall:
    """The call that resamples up to two axes."""
    shape = source.type.shape
    axes = axes or (1,)
    first, last = axes[0], axes[-1]
    pairs = tuple((shape[k], result.type.shape[k]) for k in axes)
    middle = product(shape[first + 1 : last])
    inner = product(shape[last + 1 :])
    table = SizeTable()
    params = (source.type.dtype, result.type.dtype, method, antialias, pairs, table(middle), table(inner))
    compute = compute_dtype(source.type.dtype)
    row = middle * shape[last] * inner * itemsize(compute) if len(axes) > 1 and method != "nearest" else 0
    taps = sum(_taps(n, m, method, antialias) for n, m in pairs)
    return KernelCall(
        KernelSpec(f"resize_{method}", "resize:render_resize", params),
        [source, result],
        outputs=1,
        sizes=table.values,
        extent=product(shape[:first]) * result.type.shape[first],
        flops=result.type.size * (2 * taps),
        bytes=source.type.nbytes + result.type.nbytes,
        scratch_bytes=row,
    )


def _taps(in_size: int, out_size: int, method: str, antialias: bool) -> int:
    return 1 if method == "nearest" else band(in_size, out_size, method, antialias)[1].shape[1]


def _constants(b: KernelBuilder, name: str, values: np.ndarray, dtype: str) -> Pointer:
    """A table in the kernel's read-only data."""
    element = COMPUTE_TYPES[dtype]
    array = ir.ArrayType(element, values.size)
    data = ir.GlobalVariable(b.module, array, name)
    data.linkage, data.global_constant = "internal", True
    data.initializer = ir.Constant(array, [v.item() for v in values.ravel()])
    return Pointer(b, data, dtype, name)


def render_resize(params, target) -> str:
    """LLVM IR of a resize kernel."""
    dtype, out_dtype, method, antialias, pairs, middle, inner = params
    b = KernelBuilder(f"resize_{method}", target)
    middle, inner = resolve(b, middle), resolve(b, inner)
    if method == "nearest":
        kind = word(TensorType((), dtype))
        _nearest(b, b.operand(0, kind), b.operand(1, kind), pairs, middle, inner)
    else:
        source, result = b.operand(0, dtype), b.operand(1, out_dtype)
        bands = [band(n, m, method, antialias) for n, m in pairs]
        _weighted(b, source, result, pairs, bands, middle, inner)
    return b.ir_text()


def _nearest(b: KernelBuilder, source: Pointer, result: Pointer, pairs, middle, inner) -> None:
    tables = [_constants(b, f"places{k}", nearest_indices(n, m), "int32") for k, (n, m) in enumerate(pairs)]
    (in_first, out_first), (in_last, out_last) = pairs[0], pairs[-1] if len(pairs) > 1 else (1, 1)
    row, out_row = middle * in_last * inner, middle * out_last * inner
    with b.loop(b.begin, b.end) as unit:
        outer, position = unit // out_first, b.int(unit % out_first)
        at = source + (outer * in_first + b.int(b.load(tables[0], position))) * row
        to = result + unit * out_row
        if len(pairs) == 1:
            copy_row(b, to, at, row)
            return
        with b.loop(0, middle) as m, b.loop(0, out_last) as column:
            place = m * in_last + b.int(b.load(tables[1], column))
            copy_row(b, to + (m * out_last + column) * inner, at + place * inner, inner)


def _weighted(b: KernelBuilder, source: Pointer, result: Pointer, pairs, bands, middle, inner) -> None:
    compute = compute_dtype(source.dtype)
    firsts = [_constants(b, f"first{k}", f.astype(np.int32), "int32") for k, (f, _) in enumerate(bands)]
    weights = [_constants(b, f"weights{k}", w, compute) for k, (_, w) in enumerate(bands)]
    taps = [w.shape[1] for _, w in bands]
    (in_first, out_first), (in_last, out_last) = pairs[0], pairs[-1] if len(pairs) > 1 else (1, 1)
    row, out_row = middle * in_last * inner, middle * out_last * inner
    with b.loop(b.begin, b.end) as unit:
        outer, position = unit // out_first, b.int(unit % out_first)
        at = source + (outer * in_first + b.int(b.load(firsts[0], position))) * row
        own = weights[0] + position * taps[0]
        to = result + unit * out_row
        if len(pairs) == 1:
            _sum_taps(b, to, at, row, own, taps[0], row)
            return
        scratch = b.scratch(compute)
        _sum_taps(b, scratch, at, row, own, taps[0], row)
        with b.loop(0, middle) as m, b.loop(0, out_last) as column:
            place = m * in_last + b.int(b.load(firsts[1], column))
            own = weights[1] + column * taps[1]
            _sum_taps(b, to + (m * out_last + column) * inner, scratch + place * inner, inner, own, taps[1], inner)


def _sum_taps(b: KernelBuilder, to: Pointer, at: Pointer, stride, weights: Pointer, taps: int, count) -> None:
    """to[i] = sum over taps of weights[t] * at[t * stride + i], for i below `count`."""
    compute = compute_dtype(at.dtype)
    lanes = b.target.lanes(compute)
    while isinstance(count, int) and lanes > 1 and lanes // 2 >= count:
        lanes //= 2

    def visit(i, mask, slot) -> None:
        if taps <= MOST_UNROLLED_TAPS:
            total = None
            for t in range(taps):
                value, weight = b.load(at, t * stride + i, lanes, mask), b.load_broadcast(weights, t, lanes)
                total = b.mul(value, weight) if total is None else b.fma(value, weight, total)
        else:
            variable = b.variable(b.constant(0, compute, lanes))
            with b.loop(0, taps) as t:
                value, weight = b.load(at, t * stride + i, lanes, mask), b.load_broadcast(weights, t, lanes)
                variable.set(b.fma(value, weight, variable.get()))
            total = variable.get()
        b.store(to, i, total, mask)

    b.vector_loop(0, count, lanes, visit, unroll=2 if taps <= MOST_UNROLLED_TAPS else 1)
