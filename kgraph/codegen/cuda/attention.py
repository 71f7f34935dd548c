"""Scaled dot-product attention without the score matrix in memory.

A block takes a tile of queries of one head through all tiles of keys, and carries maxima and sums of the softmax along
(Dao et al., "FlashAttention", 2022; Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018). Where
values have more columns than a block keeps sums for, several blocks make a part of them each, from the same scores.
On tensor cores the weights are rounded to the dtype of the values; the softmax and all sums are float32.
"""

from __future__ import annotations

from kgraph.codegen.attention import MASKED
from kgraph.codegen.cuda.attention_block import AttentionBlock, Plan, plan_of
from kgraph.codegen.cuda.attention_tiles import Rows, choose_tile
from kgraph.codegen.cuda.mma import instruction_for
from kgraph.codegen.cuda.shuffles import Shuffles
from kgraph.codegen.expressions import compute_dtype
from kgraph.codegen.kernel import KernelCall, KernelSpec, Launch
from kgraph.ir import Node
from kgraph.ir.dims import ceil_div, product

DTYPES = ("float16", "bfloat16", "float32", "float64")


def accepts(node: Node) -> str | None:
    """None where `lower` takes the node, else why not."""
    dtype = node.inputs[0].dtype
    return None if dtype in DTYPES else f"no attention kernel for {dtype}"


def lower(node: Node, target) -> list[KernelCall]:
    """The one call of an attention node."""
    q, k, v = node.inputs[:3]
    batch, queries, heads, depth = q.shape
    tensor = instruction_for(q.dtype, compute_dtype(q.dtype), target)
    tile = choose_tile(q.dtype, v.shape[3], target, instruction=tensor)
    operands = [*node.inputs, node.output]
    name = "attention_causal" if node.attrs["is_causal"] else "attention"
    plan, sizes = plan_of(name, node, tile, operands, tensor)
    return [
        KernelCall(
            KernelSpec(name, "kgraph.codegen.cuda.attention:render", tuple(plan)),
            operands,
            outputs=1,
            sizes=sizes,
            extent=batch * heads * ceil_div(queries, tile.rows) * ceil_div(v.shape[3], tile.width),
            flops=2 * product([batch, heads, queries, k.shape[1]]) * (depth + v.shape[3]),
            bytes=sum((x.type.nbytes for x in operands), 0),
            launch=Launch(tile.block),
        )
    ]


def render(params: tuple, target) -> str:
    """Kernel (q, k, v, mask, bias, result)."""
    return _Forward(Plan(*params), target).text()


class _Forward(AttentionBlock):
    def __init__(self, plan: Plan, target):
        def operands(k):
            self.result = k.operand(plan.dtype)

        super().__init__(plan, target, operands)
        rows = self.tile.rows
        self.sums = self.tiles.new_sums()
        self.maxima, self.norms, self.factors = (self.shared(rows) for _ in range(3))
        self.lanes = self.tile.block // rows  # neighbouring threads that share a row of scores
        self.shuffles = Shuffles(self.k, self.thread)

    def text(self) -> str:
        k, tile = self.k, self.tile
        tiles = k.let(k.ceil_div(self.queries, tile.rows), "tiles")
        parts = k.let(k.ceil_div(self.value_depth, tile.width), "parts")
        with k.block_stride(k.let(k.product([self.batch, self.heads, tiles, parts]), "total")) as number:
            batch, head, at, part = k.coordinates(number, [self.batch, self.heads, tiles, parts])
            first_query, first_column = k.let(k.mul(at, tile.rows)), k.let(k.mul(part, tile.width))
            key_head = k.let(k.div(head, self.group))
            query_start = self.start(batch, self.queries, self.heads, head, self.depth)
            key_start = self.start(batch, self.keys, self.key_heads, key_head, self.depth)
            value_start = self.start(batch, self.keys, self.key_heads, key_head, self.value_depth)
            query = Rows(self.query, query_start, self.query_stride, first_query, self.queries, self.depth)
            k.synchronise()  # the tile before is done with its rows
            with k.suite(f"if {self.thread} < {k.i(tile.rows)}:"):
                k.store(self.maxima, self.thread, self.literal(MASKED[self.dtype]))
                k.store(self.norms, self.thread, self.literal(0))
            self.tiles.clear(self.sums)
            with k.range(0, self.visible_keys(first_query), tile.rows) as first_key:
                self.tiles.products(
                    query, Rows(self.key, key_start, self.key_stride, first_key, self.keys, self.depth), self.scores
                )
                with self.elements(first_query, first_key) as (row, column, place):
                    score, _ = self.score(k.load(self.scores, place), batch, head, row, column)
                    k.store(self.scores, place, score)
                self.softmax()
                self.rescale()
                value = Rows(self.value, value_start, self.value_stride, first_key, self.keys, self.value_depth)
                self.tiles.weigh(self.sums, self.scores, value, first_column)
            k.synchronise()
            result_start = self.start(batch, self.queries, self.heads, head, self.value_depth)
            result = Rows(self.result, result_start, self.result_stride, first_query, self.queries, self.value_depth)
            self.store_sums(self.result, self.sums, result, first_column, self.finished)
        return k.text()

    def rescale(self) -> None:
        """Brings earlier sums to the new maxima."""
        k, width = self.k, self.tiles.width
        with k.range(0, k.i(self.tiles.height), 1) as i:
            factor = k.load(self.factors, self.tiles.sum_place(i, 0)[0])
            with k.range(0, k.i(width), 1) as j:
                n = k.let(k.add(k.mul(i, width), j))
                k.store(self.sums, n, f"{k.load(self.sums, n)} * {factor}")

    def finished(self, total: str, row: str) -> str:
        """Weighted values divided by the sum of the weights, which is 0 where there are no keys at all."""
        k = self.k
        norm = k.load(self.norms, row)
        return k.let(f"{total} / ({self.literal(1)} if {norm} == {self.literal(0)} else {norm})")

    def softmax(self) -> None:
        """Turns the shared scores into weights relative to the running maxima; leaves the factors of earlier sums."""
        k, tile = self.k, self.tile
        row, lane = k.let(k.div(self.thread, self.lanes), "row"), k.let(k.mod(self.thread, self.lanes), "lane")
        count = tile.rows // self.lanes
        column = k.let(k.mul(lane, count), "column")
        first = k.let(k.add(k.mul(row, tile.pitch), column), "first")
        weights = k.local(self.dtype, count)
        before = k.fresh("before")
        k.synchronise()
        k.line(f"{before} = {self.maxima.name}[{row}]")
        best, total = k.fresh("best"), k.fresh("total")
        k.line(f"{best} = {before}")
        with k.range(0, k.i(count), 1) as i:
            score = k.load(self.scores, k.add(first, i))
            k.line(f"{best} = ({score} if {score} > {best} else {best})")
        for other in self._of_lanes(best, lane):
            k.line(f"{best} = ({other} if {other} > {best} else {best})")
        k.line(f"{total} = {self.literal(0)}")
        with k.range(0, k.i(count), 1) as i:
            weight = k.let(self.exp2(f"{k.load(self.scores, k.add(first, i))} - {best}"))
            k.store(weights, i, weight)
            k.line(f"{total} = {total} + {weight}")
        totals = self._of_lanes(total, lane)
        self.shuffles.synchronise()  # the row's scores have been read
        with k.range(0, k.i(count), 1) as i:
            self.tiles.put_weight(self.scores, row, k.add(column, i), k.load(weights, i))
        with k.suite(f"if {lane} == {k.i(0)}:"):
            factor = k.let(self.exp2(f"{before} - {best}"))
            norm = k.let(f"{k.load(self.norms, row)} * {factor}")
            for other in totals:
                norm = k.let(f"{norm} + {other}")
            k.store(self.norms, row, norm)
            k.store(self.maxima, row, best)
            k.store(self.factors, row, factor)
        k.synchronise()

    def _of_lanes(self, value: str, lane: str) -> list[str]:
        """The values of the threads of a row."""
        if self.lanes == 1:
            return [value]
        k = self.k
        first = k.let(k.sub(self.shuffles.place, lane), "first")
        return [self.shuffles.of(value, self.dtype, k.let(k.add(first, n))) for n in range(self.lanes)]
