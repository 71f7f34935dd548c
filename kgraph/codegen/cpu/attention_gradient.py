"""The cotangents of q, k and v of attention, without the score matrix in memory.

Per batch entry and key head, keys and values are packed once, each as rows and transposed into panels. Tiles of queries
compute their scores against all keys again, in scratch, and with them the cotangents of the weights; a row of scores is
complete there, so that neither the sums of the softmax nor the result of attention have to be kept. Sums over queries
(the cotangents of k and v) stay in scratch until all tiles are done (after Dao et al., "FlashAttention", 2022).

A unit is one key head of one batch entry with all heads of q that read it.
"""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir

from kgraph.codegen.attention import LOG2E, MASKED, extra_strides
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
from kgraph.ir import Dim, Node
from kgraph.ir.dims import ceil_div, product

MOST_KEYS = 256  # in a block of scores
FEW_KEYS = 512  # for which the scores of a long tile of queries stay in the second-level cache
LONG_TILE, SHORT_TILE = 64, 32


def accepts(node: Node) -> str | None:
    """None where `lower` takes the node, else why not."""
    if node.name != "attention_gradient":
        return f"{node.name} is not the gradient of attention"
    return accepts_operands(*node.inputs[:3])


class Layout(NamedTuple):
    """Sizes in elements of the compute dtype, known when the kernel is written.

    queries: of a tile. block_keys: keys in a block of scores [queries, score_stride]. depth, value_depth: of rows in
    scratch, whole panels. vectors, value_vectors: of a panel of them.
    """

    lanes: int
    queries: int
    block_keys: int
    score_stride: int
    vectors: int
    depth: int
    value_vectors: int
    value_depth: int

    @property
    def tile(self) -> int:
        """Scratch for the rows of one tile of queries: q, the cotangent, the cotangent of q."""
        return self.queries * (2 * self.depth + self.value_depth)

    def keys(self, shape: Shape, keys):
        """Scratch for all keys of a head: transposed keys and values, rows of keys, the cotangents of both."""
        padded = ceil_div(keys, 2 * self.lanes) * (2 * self.lanes)
        return padded * (shape.depth + shape.value_depth) + keys * (2 * self.depth + self.value_depth)

    def scores(self, keys):
        """Scratch for the scores of a tile of queries against all keys."""
        return ceil_div(keys, self.block_keys) * (self.queries * self.score_stride)


def layout_of(shape: Shape, keys, target) -> Layout:
    """The layout for a number of keys, which may be a Dim."""
    lanes = target.lanes(compute_dtype(shape.dtype))
    few = not isinstance(keys, Dim) and keys <= FEW_KEYS
    block = MOST_KEYS if isinstance(keys, Dim) else min(MOST_KEYS, -(-max(keys, 1) // (2 * lanes)) * (2 * lanes))
    padded = []
    for depth in (shape.depth, shape.value_depth):
        vectors = 2 if depth > lanes else 1
        padded += [vectors, -(-depth // (vectors * lanes)) * (vectors * lanes)]
    return Layout(lanes, LONG_TILE if few else SHORT_TILE, block, block + lanes, *padded)


def lower(node: Node, target) -> list[KernelCall]:
    """The one call of an attention_gradient node."""
    q, k, v, *rest = node.inputs
    batch, queries, heads, depth = q.shape
    keys = k.shape[1]
    shape = Shape.of(q, k, v, node.attrs)
    layout = layout_of(shape, keys, target)
    table = SizeTable()
    full = (batch, heads, queries, keys)
    strides = tuple(table.all(extra_strides(x)) for x in rest[:-1])
    params = (tuple(shape), tuple(layout), table(queries), table(keys), strides)
    elements = layout.tile + layout.keys(shape, keys) + 2 * layout.scores(keys)
    tensors = (*node.inputs, *node.outputs)
    name = "attention_causal_gradient" if shape.is_causal else "attention_gradient"
    return [
        KernelCall(
            KernelSpec(name, "attention_gradient:render_attention_gradient", params),
            list(tensors),
            outputs=len(node.outputs),
            sizes=table.values,
            extent=batch * shape.key_heads,
            flops=product(full) * (6 * depth + 4 * shape.value_depth),
            bytes=sum((x.type.nbytes for x in tensors), 0),
            scratch_bytes=elements * itemsize(compute_dtype(q.dtype)),
        )
    ]


class AttentionGradientKernel(AttentionOperands):
    """What is known while the kernel is written."""

    def __init__(self, params, target):
        shape, layout, queries, keys, strides = params
        shape = Shape(*shape)
        self.layout = layout = Layout(*layout)
        super().__init__(KernelBuilder("attention_gradient", target), shape, queries, keys, strides)
        b, number = self.b, self.next_operand
        self.cotangent = b.operand(number, shape.dtype)
        self.outputs = [b.operand(number + 1 + i, shape.dtype) for i in range(3)]
        self.to_logits = b.operand(number + 4, self.compute) if shape.has_bias else None
        at = 0

        def scratch(name: str, elements) -> Pointer:
            nonlocal at
            here = b.scratch(self.compute, at * itemsize(self.compute))
            at = elements + at
            return Pointer(b, here.value, self.compute, name)

        self.tile_q = scratch("tile_q", layout.queries * layout.depth)
        self.tile_cotangent = scratch("tile_cotangent", layout.queries * layout.value_depth)
        self.to_q = scratch("to_q", layout.queries * layout.depth)
        keys = self.total_keys
        padded = b.ceil_div(keys, 2 * self.lanes) * (2 * self.lanes)
        self.key_panels = scratch("keys", padded * shape.depth)
        self.value_panels = scratch("values", padded * shape.value_depth)
        self.key_rows = scratch("key_rows", keys * layout.depth)
        self.to_k = scratch("to_k", keys * layout.depth)
        self.to_v = scratch("to_v", keys * layout.value_depth)
        blocks = b.ceil_div(keys, layout.block_keys)
        self.scores = scratch("scores", blocks * self.block)
        self.score_cotangents = scratch("score_cotangents", 0)
        self._make_products()

    @property
    def block(self) -> int:
        """Elements of a block of scores."""
        return self.layout.queries * self.layout.score_stride

    def _make_products(self) -> None:
        layout, lanes = self.layout, self.lanes

        def product(name: str, vectors: int, a_stride: int, b_stride: int, c_stride: int, **fields) -> BlockProduct:
            panel = Panel(self.compute, lanes, vectors, a_stride, b_stride, c_stride, **fields)
            return BlockProduct(self.b, name, panel)

        stride, sums = layout.score_stride, {"start": "sums"}
        transposed = sums | {"a_step": stride}
        self.score_product = product("score", 2, layout.depth, 2 * lanes, stride)
        self.weight_product = self.score_product
        if layout.value_depth != layout.depth:
            self.weight_product = product("to_weight", 2, layout.value_depth, 2 * lanes, stride)
        self.q_product = product("to_q", layout.vectors, stride, layout.depth, layout.depth, **sums)
        self.k_product = product("to_k", layout.vectors, 1, layout.depth, layout.depth, **transposed)
        self.v_product = self.k_product
        if layout.value_depth != layout.depth:
            self.v_product = product(
                "to_v", layout.value_vectors, 1, layout.value_depth, layout.value_depth, **transposed
            )

    def render(self) -> str:
        b, shape, layout = self.b, self.shape, self.layout
        group = shape.heads // shape.key_heads
        with b.loop(b.begin, b.end) as unit:
            batch, key_head = unit // shape.key_heads, b.int(unit % shape.key_heads)
            first_key = batch * self.total_keys
            self.pack_transposed(self.k, batch, key_head, shape.depth, self.key_panels)
            self.pack_transposed(self.v, batch, key_head, shape.value_depth, self.value_panels)
            self.pack_rows(
                self.k, first_key, self.total_keys, shape.key_heads, key_head, shape.depth, None, self.key_rows,
                layout.depth,
            )  # fmt: skip
            self.clear(self.to_k, self.total_keys, layout.depth)
            self.clear(self.to_v, self.total_keys, layout.value_depth)
            with b.loop(0, group) as member:
                head = key_head * group + member
                with b.loop(0, self.total_queries, layout.queries) as first:
                    self.query_tile(batch, head, first, b.min(self.total_queries - first, layout.queries))
            # The scale and the change of units that q carried.
            self.write(self.to_k, first_key, self.total_keys, key_head, 1, 1 / LOG2E)
            self.write(self.to_v, first_key, self.total_keys, key_head, 2)
        return b.ir_text()

    def clear(self, rows_at: Pointer, rows, width: int) -> None:
        """Zeros for `rows` rows of scratch."""
        zero = self.b.constant(0, self.compute, self.lanes)
        with self.b.loop(0, rows * width, self.lanes) as i:
            self.b.store(rows_at, i, zero)

    def write(self, rows_at: Pointer, first, rows, head, number: int, factor: float | None = None) -> None:
        """Rows of scratch, times `factor`, to the rows from `first` on of one head of output `number`."""
        b, shape, layout, lanes = self.b, self.shape, self.layout, self.lanes
        depth, width = ((shape.depth, layout.depth), (shape.value_depth, layout.value_depth))[number == 2]
        stride = (shape.heads if number == 0 else shape.key_heads) * depth
        target = self.outputs[number] + (first * stride + head * depth)
        with b.loop(0, rows) as r:
            for column in range(0, depth, lanes):
                valid = min(lanes, depth - column)
                value = b.load(rows_at, r * width + column, lanes)
                value = value if factor is None else b.mul(value, factor)
                b.store(target, r * stride + column, value, None if valid == lanes else b.tail_mask(valid, lanes))

    # -- one tile of queries --------------------------------------------------------------------------------------
    def query_tile(self, batch, head, first, rows) -> None:
        """What the queries from `first` on add to the cotangents of keys and values, and their own."""
        b, shape, layout = self.b, self.shape, self.layout
        start = batch * self.total_queries + first
        scale = b.constant(shape.scale * LOG2E, self.compute, self.lanes)
        self.pack_rows(self.q, start, rows, shape.heads, head, shape.depth, scale, self.tile_q, layout.depth)
        self.pack_rows(
            self.cotangent, start, rows, shape.heads, head, shape.value_depth, None, self.tile_cotangent,
            layout.value_depth,
        )  # fmt: skip
        self.clear(self.to_q, rows, layout.depth)
        limit = self.total_keys
        if shape.is_causal and not shape.has_mask and self.to_logits is None:
            limit = b.min(limit, first + rows)  # later keys have no weight, as every query sees the first key
        blocks = b.ceil_div(limit, layout.block_keys)
        with b.loop(0, blocks) as number:
            at = number * self.block
            key = number * layout.block_keys
            with b.loop(0, b.min(limit - key, layout.block_keys), 2 * self.lanes) as column:
                to = at + column
                panel = self.key_panels + (key + column) * shape.depth
                self.score_product.emit(self.tile_q, panel, self.scores + to, rows, shape.depth)
                panel = self.value_panels + (key + column) * shape.value_depth
                self.weight_product.emit(
                    self.tile_cotangent, panel, self.score_cotangents + to, rows, shape.value_depth
                )
        with b.loop(0, rows) as r:
            self.row(batch, head, first + r, r, blocks, limit)
        with b.loop(0, blocks) as number:
            key = number * layout.block_keys
            self.add_products(number * self.block, key, b.min(limit - key, layout.block_keys), rows)
        self.write(self.to_q, start, rows, head, 0, shape.scale)

    def row(self, batch, head, query, r, blocks, limit) -> None:
        """From a row's scores and cotangents of weights to its weights and cotangents of scores."""
        b, lanes, layout = self.b, self.lanes, self.layout
        scores, cotangents = (x + r * layout.score_stride for x in (self.scores, self.score_cotangents))
        masked = b.constant(MASKED[self.compute], self.compute, lanes)
        zero = b.constant(0, self.compute, lanes)
        maxima = [b.variable(masked) for _ in range(4)]

        def greater(x, y):
            return b.select(b.compare(">", x, y), x, y)

        def over_keys(body) -> None:
            """`body(at, key, i, mask, slot)` for all vectors of the row; `i` counts from `key` on."""
            with b.loop(0, blocks) as number:
                at, key = number * self.block, number * layout.block_keys

                def inner(i, mask, slot) -> None:
                    body(at + i, key, i, mask, slot)

                b.vector_loop(0, b.min(limit - key, layout.block_keys), lanes, inner, unroll=4)

        def find_maximum(at, key, i, mask, slot) -> None:
            score = b.load(scores, at, lanes, mask)
            adjust = self.adjustment(batch, head, query, key)
            if adjust is not None:
                score = adjust(score, i, mask)
                b.store(scores, at, score, mask)
            if mask is not None:
                score = b.select(mask, score, masked)
            maxima[slot].set(greater(score, maxima[slot].get()))

        over_keys(find_maximum)
        best = greater(greater(maxima[0].get(), maxima[1].get()), greater(maxima[2].get(), maxima[3].get()))
        maximum = b.broadcast(b.reduce_lanes(best, greater), lanes)
        sums, weighted = ([b.variable(zero) for _ in range(4)] for _ in range(2))

        def exponential(at, key, i, mask, slot) -> None:
            weight = exp2_nonpositive(b, b.sub(b.load(scores, at, lanes, mask), maximum))
            if mask is not None:
                weight = b.select(mask, weight, zero)
            b.store(scores, at, weight, mask)
            sums[slot].set(b.add(sums[slot].get(), weight))
            weighted[slot].set(b.fma(weight, b.load(cotangents, at, lanes, mask), weighted[slot].get()))

        over_keys(exponential)
        total, mean = (self.over_lanes(parts) for parts in (sums, weighted))
        inverse = b.div(b.constant(1, self.compute), total)
        mean = b.broadcast(b.mul(mean, inverse), lanes)
        inverse = b.broadcast(inverse, lanes)

        def finish(at, key, i, mask, slot) -> None:
            weight = b.mul(b.load(scores, at, lanes, mask), inverse)
            b.store(scores, at, weight, mask)
            to_score = b.mul(weight, b.sub(b.load(cotangents, at, lanes, mask), mean))
            if self.mask is not None:  # a row masked whole has weights
                to_score = b.select(self.visible(batch, head, query, key, i, mask), to_score, zero)
            b.store(cotangents, at, to_score, mask)
            if self.to_logits is not None:
                place = (batch * self.shape.heads + head) * self.total_queries + query
                b.store(self.to_logits, place * self.total_keys + key + i, to_score, mask)

        over_keys(finish)

    def over_lanes(self, parts: list) -> ir.Value:
        """The sum of four vectors of sums."""
        b = self.b
        first, second, third, fourth = (p.get() for p in parts)
        return b.reduce_lanes(b.add(b.add(first, second), b.add(third, fourth)), b.add)

    def add_products(self, at, key, count, rows) -> None:
        """The products with `count` keys from `key` on, whose block of scores begins at `at`."""
        layout, lanes = self.layout, self.lanes
        weights, scores = self.scores + at, self.score_cotangents + at
        for column in range(0, layout.depth, layout.vectors * lanes):
            self.q_product.emit(scores, self.key_rows + (key * layout.depth + column), self.to_q + column, rows, count)
            self.k_product.emit(scores, self.tile_q + column, self.to_k + (key * layout.depth + column), count, rows)
        for column in range(0, layout.value_depth, layout.value_vectors * lanes):
            self.v_product.emit(
                weights, self.tile_cotangent + column, self.to_v + (key * layout.value_depth + column), count, rows
            )


def render_attention_gradient(params, target) -> str:
    """LLVM IR of a kernel of the cotangents of attention."""
    return AttentionGradientKernel(params, target).render()
