"""Running sums, products, extrema and log-sum-exps along one axis.

Where elements follow each other along another axis behind the scanned one, vectors lie along that axis and the scan is
a loop. Along the last axis a vector is scanned in registers, by log2(lanes) shifted combinations, and the last lane
is carried to the next vector.
"""

from __future__ import annotations

import functools

from llvmlite import ir

from kgraph.codegen.cpu.builder import COMPUTE_TYPES, Int, KernelBuilder, Pointer, compute_dtype, lanes_of
from kgraph.codegen.cpu.scalar_ops import EMITTERS
from kgraph.codegen.cpu.strided import SizeTable, resolve
from kgraph.codegen.expressions import EXPENSIVE
from kgraph.codegen.kernel import KernelCall, KernelSpec
from kgraph.codegen.scans import COMBINE, neutral
from kgraph.ir import Dim, Node
from kgraph.ir.dims import ceil_div, product


def accepts(node: Node) -> str | None:
    """None where `lower` takes the node, else why not."""
    if node.name not in COMBINE:
        return f"{node.name} is no cumulative reduction"
    if node.output.dtype not in COMPUTE_TYPES or node.output.dtype == "bool":
        return f"no cumulative kernel for {node.output.dtype}"
    return None


def lower(node: Node, target) -> list[KernelCall]:
    """The one call of a cumulative reduction."""
    x, axis = node.inputs[0], node.attrs["axis"]
    outer, n, inner = product(x.shape[:axis]), x.shape[axis], product(x.shape[axis + 1 :])
    lanes = min(16, target.lanes(compute_dtype(x.dtype)))
    along_last = not isinstance(inner, Dim) and inner == 1
    table = SizeTable()
    params = (COMBINE[node.name], x.dtype, lanes, bool(node.attrs["reverse"]), table(n), table(inner))
    steps = 1 + (lanes.bit_length() - 1 if along_last else 0)
    return [
        KernelCall(
            KernelSpec(node.name, "cumulative:render_cumulative", params),
            [x, node.output],
            outputs=1,
            sizes=table.values,
            extent=outer if along_last else outer * ceil_div(inner, lanes),
            flops=x.type.size * (EXPENSIVE.get(COMBINE[node.name], 1) * steps),
            bytes=x.type.nbytes * 2,
        )
    ]


def render_cumulative(params, target) -> str:
    """x[outer, n, inner] -> the same shape; a unit is a row (inner == 1), or a vector of inner elements."""
    combine, dtype, lanes, reverse, n, inner = params
    b = KernelBuilder(f"cumulative_{combine}", target)
    x, out = b.operand(0, dtype), b.operand(1, dtype)
    n, inner = resolve(b, n), resolve(b, inner)
    compute = compute_dtype(dtype)
    start = b.constant(neutral(combine, dtype), compute, lanes)

    def fold(earlier, later):
        return EMITTERS[combine](b, [earlier, later], [compute] * 2, compute)

    with b.loop(b.begin, b.end) as unit:
        if isinstance(inner, int) and inner == 1:
            _scan_row(b, x + unit * n, out + unit * n, n, start, reverse, fold)
        else:
            blocks = b.ceil_div(inner, lanes)
            column = b.int(unit % blocks) * lanes
            at = unit // blocks * (n * inner) + column
            mask = b.tail_mask(inner - column, lanes)
            state = b.variable(start)
            with b.loop(0, n) as i:
                place = at + ((n - 1 - i) if reverse else i) * inner
                state.set(fold(state.get(), b.load(x, place, lanes, mask)))
                b.store(out, place, state.get(), mask)
    return b.ir_text()


def _scan_row(b: KernelBuilder, x: Pointer, out: Pointer, n: int | Int, start: ir.Value, reverse: bool, fold) -> None:
    """A row of contiguous elements, vector by vector from its begin or its end."""
    lanes = lanes_of(start)
    carry = b.variable(start)
    step = functools.partial(_scan_vector, b, start=start, reverse=reverse, fold=fold)

    def visit(at, mask) -> None:
        value = b.load(x, at, lanes, mask)
        if mask is not None:
            value = b.select(mask, value, start)
        value = fold(carry.get(), step(value))
        b.store(out, at, value, mask)
        carry.set(b.shuffle(value, None, [0 if reverse else lanes - 1] * lanes))

    whole = n - n % lanes
    with b.loop(0, whole, lanes) as i:
        visit(n - lanes - i if reverse else i, None)
    with b.if_then(b.int(whole) < n):
        visit(0 if reverse else whole, b.tail_mask(n - whole, lanes))


def _scan_vector(b: KernelBuilder, value: ir.Value, start: ir.Value, reverse: bool, fold) -> ir.Value:
    """Running combinations within a vector (from its last lane down in reverse)."""
    lanes = lanes_of(value)
    shift = 1
    while shift < lanes:
        if reverse:
            places = [k + shift if k + shift < lanes else lanes for k in range(lanes)]
        else:
            places = [k - shift if k >= shift else lanes for k in range(lanes)]
        value = fold(b.shuffle(value, start, places), value)
        shift *= 2
    return value
