"""Scaled dot-product attention without the score matrix in memory.

Per batch entry and head, keys and values are packed once into panels; then for tiles of queries the keys come in tiles,
and sums and maxima of the softmax are carried along (Dao et al., "FlashAttention", 2022; Milakov and Gimelshein,
"Online normalizer calculation for softmax", 2018). Scores live in scratch.

A unit is one tile of queries of one head; consecutive units of a call share the packed keys and values.
"""

from __future__ import annotations

from typing import NamedTuple

from kgraph.codegen.attention import LOG2E, MASKED, extra_strides
from kgraph.codegen.cpu import attention_rows
from kgraph.codegen.cpu.attention_operands import (
    AttentionOperands,
    Shape,
    accepts_operands,
    exp2_nonpositive,
)
from kgraph.codegen.cpu.block_product import BlockProduct, Panel
from kgraph.codegen.cpu.builder import KernelBuilder, Pointer, compute_dtype, itemsize
from kgraph.codegen.cpu.strided import SizeTable
from kgraph.codegen.kernel import KernelCall, KernelSpec
from kgraph.ir import Node, Value
from kgraph.ir.dims import ceil_div, product

QUERY_TILE = 32
KEY_TILE = 256


def accepts(node: Node) -> str | None:
    """None where `lower` takes the node, else why not."""
    if node.name != "attention":
        return f"{node.name} is not attention"
    return accepts_operands(*node.inputs[:3])


def views(node: Node) -> tuple[Value, ...]:
    """Keys and values that are slices, where they are read out of what was sliced."""
    return attention_rows.views(node) if attention_rows.takes(node) else ()


class Layout(NamedTuple):
    """Scratch of one thread, in elements of the compute dtype from its start."""

    lanes: int
    value_vectors: int
    value_panels: int
    score_stride: int
    queries: int
    sums: int
    maxima: int
    norms: int
    keys: int

    @property
    def key_panel(self) -> int:
        """Keys in a panel of packed keys."""
        return 2 * self.lanes

    @property
    def value_panel(self) -> int:
        """Columns in a panel of packed values."""
        return self.value_vectors * self.lanes

    @property
    def sum_stride(self) -> int:
        """Distance between the sums of one query and the next."""
        return self.value_panels * self.value_panel


def _layout(shape: Shape, target) -> Layout:
    lanes = target.lanes(compute_dtype(shape.dtype))
    vectors = 2 if shape.value_depth > lanes else 1
    panels = -(-shape.value_depth // (vectors * lanes))
    stride = KEY_TILE + lanes
    offsets = [0]
    for row in (stride, shape.depth, panels * vectors * lanes, 1, 1):  # per query
        offsets.append(offsets[-1] + -(-QUERY_TILE * row // lanes) * lanes)
    return Layout(lanes, vectors, panels, stride, *offsets[1:])


def lower(node: Node, target) -> list[KernelCall]:
    """The one call of an attention node."""
    if attention_rows.takes(node):
        return attention_rows.lower(node, target)
    q, k, v, *rest = node.inputs
    batch, queries, heads, depth = q.shape
    keys = k.shape[1]
    shape = Shape.of(q, k, v, node.attrs)
    layout = _layout(shape, target)
    table = SizeTable()
    full = (batch, heads, queries, keys)
    params = (tuple(shape), table(queries), table(keys), tuple(table.all(extra_strides(x)) for x in rest))
    panels = ceil_div(keys, layout.key_panel)
    elements = layout.keys + panels * (layout.key_panel * depth) + keys * layout.sum_stride
    tensors = (*node.inputs, node.output)
    return [
        KernelCall(
            KernelSpec("attention_causal" if shape.is_causal else "attention", "attention:render_attention", params),
            list(tensors),
            outputs=1,
            sizes=table.values,
            extent=batch * heads * ceil_div(queries, QUERY_TILE),
            flops=product(full) * (2 * (depth + shape.value_depth)),
            bytes=sum((x.type.nbytes for x in tensors), 0),
            scratch_bytes=elements * itemsize(compute_dtype(q.dtype)),
        )
    ]


class AttentionKernel(AttentionOperands):
    """What is known while the kernel is written."""

    def __init__(self, params, target):
        shape, queries, keys, strides = params
        shape = Shape(*shape)
        self.layout = layout = _layout(shape, target)
        super().__init__(KernelBuilder("attention", target), shape, queries, keys, strides)
        b = self.b
        self.out = b.operand(self.next_operand, shape.dtype)

        def scratch(elements, name: str) -> Pointer:
            at = b.scratch(self.compute, elements * itemsize(self.compute))
            return Pointer(b, at.value, self.compute, name)

        self.scores, self.queries = scratch(0, "scores"), scratch(layout.queries, "queries")
        self.sums, self.maxima, self.norms = (
            scratch(at, name)
            for at, name in ((layout.sums, "sums"), (layout.maxima, "maxima"), (layout.norms, "norms"))
        )
        self.key_panels = scratch(layout.keys, "keys")
        panels = b.ceil_div(self.total_keys, layout.key_panel)
        self.value_panels = scratch(layout.keys + panels * (layout.key_panel * shape.depth), "values")
        lanes = layout.lanes
        self.score_product = BlockProduct(
            b, "scores", Panel(self.compute, lanes, 2, shape.depth, layout.key_panel, layout.score_stride)
        )
        self.value_product = BlockProduct(
            b,
            "weigh",
            Panel(
                self.compute,
                lanes,
                layout.value_vectors,
                layout.score_stride,
                layout.value_panel,
                layout.sum_stride,
                start="sums",
            ),
        )

    def render(self) -> str:
        b, shape = self.b, self.shape
        tiles = b.ceil_div(self.total_queries, QUERY_TILE)
        group = shape.heads // shape.key_heads
        packed = b.variable(b.i64(-1))
        with b.loop(b.begin, b.end) as unit:
            head_number, tile = unit // tiles, unit % tiles
            batch, head = head_number // shape.heads, b.int(head_number % shape.heads)
            key_head = batch * shape.key_heads + head // group
            with b.if_then(b.ir.icmp_signed("!=", packed.get(), b.i64(key_head))):
                self.pack_transposed(self.k, batch, head // group, shape.depth, self.key_panels)
                self.pack_values(batch, head // group)
                packed.set(b.i64(key_head))
            first = b.int(tile * QUERY_TILE)
            rows = b.min(self.total_queries - first, QUERY_TILE)
            self.query_tile(batch, head, first, rows)
        return b.ir_text()

    def pack_values(self, batch, head) -> None:
        """Values in panels [panel][key][vectors], zeros behind the depth."""
        b, depth, layout = self.b, self.shape.value_depth, self.layout
        stride = self.shape.key_heads * depth
        source = self.v + (batch * self.total_keys * stride + head * depth)
        with b.loop(0, self.total_keys) as key:
            row = source + key * stride
            for number in range(layout.value_panels):
                to = self.value_panels + (self.total_keys * (number * layout.value_panel) + key * layout.value_panel)
                for j in range(layout.value_vectors):
                    column = number * layout.value_panel + j * layout.lanes
                    b.store(to, j * layout.lanes, self.load_part(row, column, depth))

    # -- one tile of queries --------------------------------------------------------------------------------------
    def query_tile(self, batch, head, first, rows) -> None:
        b, shape, layout = self.b, self.shape, self.layout
        stride = shape.heads * shape.depth
        source = self.q + ((batch * self.total_queries + first) * stride + head * shape.depth)
        scale = b.constant(shape.scale * LOG2E, self.compute, layout.lanes)
        zero = b.constant(0, self.compute, layout.lanes)
        with b.loop(0, rows) as r:
            for column in range(0, shape.depth, layout.lanes):
                valid = min(layout.lanes, shape.depth - column)
                mask = None if valid == layout.lanes else b.tail_mask(valid, layout.lanes)
                vector = self.load_part(source + r * stride, column, shape.depth)
                b.store(self.queries, r * shape.depth + column, b.mul(vector, scale), mask)
            for column in range(0, layout.sum_stride, layout.lanes):
                b.store(self.sums, r * layout.sum_stride + column, zero)
            b.store(self.maxima, r, b.constant(MASKED[self.compute], self.compute))
            b.store(self.norms, r, b.constant(1, self.compute))  # stays where there are no keys at all
        limit = self.total_keys
        if shape.is_causal and not shape.has_mask:
            limit = b.min(limit, first + rows)  # later keys have no weight, as every query sees the first key
        with b.loop(0, limit, KEY_TILE) as key:
            self.key_tile(batch, head, first, rows, key, b.min(limit - key, KEY_TILE))
        self.finish(batch, head, first, rows)

    def key_tile(self, batch, head, first, rows, key, count) -> None:
        """Scores, weights and weighted values of `count` keys from `key` on."""
        b, layout = self.b, self.layout
        with b.loop(0, count, layout.key_panel) as column:
            panel = self.key_panels + (key + column) * self.shape.depth
            self.score_product.emit(self.queries, panel, self.scores + column, rows, self.shape.depth)
        with b.loop(0, rows) as r:
            self.softmax_row(batch, head, first + r, r, key, count)
        for number in range(layout.value_panels):
            panel = self.value_panels + (self.total_keys * (number * layout.value_panel) + key * layout.value_panel)
            self.value_product.emit(self.scores, panel, self.sums + number * layout.value_panel, rows, count)

    def softmax_row(self, batch, head, query, r, key, count) -> None:
        """Turns a row of scores into weights relative to the running maximum; rescales what came before."""
        b, lanes = self.b, self.layout.lanes
        row = self.scores + r * self.layout.score_stride
        masked = b.constant(MASKED[self.compute], self.compute, lanes)
        maxima = [b.variable(masked) for _ in range(4)]
        adjust = self.adjustment(batch, head, query, key)

        def find_maximum(i, mask, slot) -> None:
            score = b.load(row, i, lanes, mask)
            if adjust is not None:
                score = adjust(score, i, mask)
                b.store(row, i, score, mask)
            if mask is not None:
                score = b.select(mask, score, masked)
            best = maxima[slot].get()
            maxima[slot].set(b.select(b.compare(">", score, best), score, best))

        def greater(x, y):
            return b.select(b.compare(">", x, y), x, y)

        b.vector_loop(0, count, lanes, find_maximum, unroll=4)
        best = greater(greater(maxima[0].get(), maxima[1].get()), greater(maxima[2].get(), maxima[3].get()))
        before = b.load(self.maxima, r)
        maximum = greater(b.reduce_lanes(best, greater), before)
        b.store(self.maxima, r, maximum)
        wide = b.broadcast(maximum, lanes)
        zero = b.constant(0, self.compute, lanes)
        sums = [b.variable(zero) for _ in range(4)]

        def weigh(i, mask, slot) -> None:
            weight = exp2_nonpositive(b, b.sub(b.load(row, i, lanes, mask), wide))
            b.store(row, i, weight, mask)
            if mask is not None:
                weight = b.select(mask, weight, zero)
            sums[slot].set(b.add(sums[slot].get(), weight))

        b.vector_loop(0, count, lanes, weigh, unroll=4)
        total = b.add(b.add(sums[0].get(), sums[1].get()), b.add(sums[2].get(), sums[3].get()))
        total = b.reduce_lanes(total, b.add)
        with b.if_else(b.int(key).equals(0)) as (first_tile, later):
            with first_tile:
                b.store(self.norms, r, total)
            with later:
                factor = exp2_nonpositive(b, b.broadcast(b.sub(before, maximum), lanes))
                b.store(self.norms, r, b.fma(b.load(self.norms, r), b.lane(factor, 0), total))
                for column in range(0, self.layout.sum_stride, lanes):
                    at = r * self.layout.sum_stride + column
                    b.store(self.sums, at, b.mul(b.load(self.sums, at, lanes), factor))

    def finish(self, batch, head, first, rows) -> None:
        """The weighted values divided by the sum of the weights."""
        b, shape, layout = self.b, self.shape, self.layout
        stride = shape.heads * shape.value_depth
        target = self.out + ((batch * self.total_queries + first) * stride + head * shape.value_depth)
        with b.loop(0, rows) as r:
            norm = b.load(self.norms, r)
            inverse = b.broadcast(b.div(b.constant(1, self.compute), norm), layout.lanes)
            for column in range(0, shape.value_depth, layout.lanes):
                valid = min(layout.lanes, shape.value_depth - column)
                mask = None if valid == layout.lanes else b.tail_mask(valid, layout.lanes)
                value = b.mul(b.load(self.sums, r * layout.sum_stride + column, layout.lanes), inverse)
                b.store(target, r * stride + column, value, mask)


def render_attention(params, target) -> str:
    """LLVM IR of an attention kernel."""
    return AttentionKernel(params, target).render()
