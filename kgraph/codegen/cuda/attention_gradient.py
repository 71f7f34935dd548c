"""The cotangents of q, k and v of attention (and of its logits), without the score matrix in memory.

Three kernels, each of which computes scores again from q and k (after Dao et al., "FlashAttention", 2022):
- `statistics` takes every tile of queries through the keys for the maximum and the sum of the softmax, and for the mean
  of the weights' cotangents under the weights;
- `queries` then has the cotangents of the logits, and sums those of q over the keys;
- `keys` takes every tile of keys through the queries of all heads that read it, for the cotangents of k and v.
Every sum is made by one block in a fixed order. On tensor cores weights and cotangents of logits are rounded to the
dtype of the operands before they are multiplied.
"""

from __future__ import annotations

from kgraph.codegen.attention import MASKED
from kgraph.codegen.cuda import attention
from kgraph.codegen.cuda.attention_block import AttentionBlock, Plan, plan_of
from kgraph.codegen.cuda.attention_tiles import Rows, choose_tile
from kgraph.codegen.cuda.mma import instruction_for
from kgraph.codegen.expressions import compute_dtype
from kgraph.codegen.kernel import KernelCall, KernelSpec, Launch, Temporary
from kgraph.ir import Dim, Node, TensorType
from kgraph.ir.dims import ceil_div, product

CHUNK = 8  # elements of a panel: two tiles of scores leave no room for more


def accepts(node: Node) -> str | None:
    """None where `lower` takes the node, else why not."""
    if any(isinstance(x.shape[3], Dim) for x in node.inputs[:3]):
        return "symbolic depth"
    return attention.accepts(node)


def lower(node: Node, target) -> list[KernelCall]:
    """The three calls of an attention_gradient node."""
    q, k, v = node.inputs[:3]
    batch, queries, heads, depth = q.shape
    keys, key_heads, value_depth = k.shape[1], k.shape[2], v.shape[3]
    dtype = compute_dtype(q.dtype)
    tensor = instruction_for(q.dtype, dtype, target)
    statistics = [Temporary(TensorType((batch, heads, queries), dtype)) for _ in range(3)]
    widest = max(depth, value_depth)
    calls = []
    for name, outputs, sums, tiles, columns in (
        ("statistics", statistics, depth, batch * heads, 1),
        ("queries", [node.outputs[0], *node.outputs[3:]], depth, batch * heads, depth),
        ("keys", list(node.outputs[1:3]), widest, batch * key_heads, widest),
    ):
        tile = choose_tile(q.dtype, sums, target, CHUNK, tensor)
        if name == "statistics":
            tile = tile._replace(gap=1)  # threads read along rows of their own
        operands = [*node.inputs, *(statistics if name != "statistics" else ()), *outputs]
        label = f"attention_{'causal_' if node.attrs['is_causal'] else ''}gradient_{name}"
        plan, sizes = plan_of(label, node, tile, operands, tensor)
        rows = keys if name == "keys" else queries
        calls.append(
            KernelCall(
                KernelSpec(label, f"kgraph.codegen.cuda.attention_gradient:render_{name}", tuple(plan)),
                operands,
                outputs=len(outputs),
                sizes=sizes,
                extent=tiles * ceil_div(rows, tile.rows) * (1 if columns == 1 else ceil_div(columns, tile.width)),
                flops=2 * product([batch, heads, queries, keys]) * (depth + value_depth) * (2 if name == "keys" else 1),
                bytes=sum((x.type.nbytes for x in operands), 0),
                launch=Launch(tile.block),
            )
        )
    return calls


def render_statistics(params: tuple, target) -> str:
    """Kernel (q, k, v, mask, bias, cotangent, maxima, inverse norms, means)."""
    return _Statistics(Plan(*params), target).text()


def render_queries(params: tuple, target) -> str:
    """Kernel (q, k, v, mask, bias, cotangent, statistics, cotangent of q, that of the logits with a bias)."""
    return _Queries(Plan(*params), target).text()


def render_keys(params: tuple, target) -> str:
    """Kernel (q, k, v, mask, bias, cotangent, statistics, cotangents of k and v)."""
    return _Keys(Plan(*params), target).text()


class _Gradient(AttentionBlock):
    """What the three kernels share. results: dtypes of the operands behind the statistics."""

    def __init__(self, plan: Plan, target, results: list[str]):
        def operands(k):
            self.cotangent = k.operand(plan.dtype)
            self.statistics = [k.operand(compute_dtype(plan.dtype)) for _ in range(3)]
            self.results = [k.operand(dtype) for dtype in results]

        super().__init__(plan, target, operands)
        self.to_weights = self.shared(self.tile.rows * self.tile.pitch)

    def head(self, batch: str, head: str, key_head: str) -> None:
        """Sets where the rows of a head start."""
        self.at = batch, head
        self.query_start = self.start(batch, self.queries, self.heads, head, self.depth)
        self.result_start = self.start(batch, self.queries, self.heads, head, self.value_depth)
        self.key_start = self.start(batch, self.keys, self.key_heads, key_head, self.depth)
        self.value_start = self.start(batch, self.keys, self.key_heads, key_head, self.value_depth)
        k = self.k
        self.statistics_start = k.let(k.mul(k.add(k.mul(batch, self.heads), head), self.queries), "start")

    def rows_of(self, which: str, first: str) -> Rows:
        """The rows of q, of the cotangent, of k or of v from `first` on."""
        query, result = (self.queries, self.depth), (self.queries, self.value_depth)
        return {
            "query": Rows(self.query, self.query_start, self.query_stride, first, *query),
            "cotangent": Rows(self.cotangent, self.result_start, self.result_stride, first, *result),
            "key": Rows(self.key, self.key_start, self.key_stride, first, self.keys, self.depth),
            "value": Rows(self.value, self.value_start, self.value_stride, first, self.keys, self.value_depth),
        }[which]

    def tile_products(self, first_query: str, first_key: str) -> None:
        """Leaves the products of q and k, and of the cotangent and v, of a tile in shared memory."""
        self.tiles.products(self.rows_of("query", first_query), self.rows_of("key", first_key), self.scores)
        self.tiles.products(self.rows_of("cotangent", first_query), self.rows_of("value", first_key), self.to_weights)

    def weight(self, place: str, query: str, key: str) -> tuple[str, str]:
        """(weight, cotangent of the logit) of a query and a key, from the products; 0 where there are none."""
        k = self.k
        to_weight = k.load(self.to_weights, place)
        score, allowed = self.score(k.load(self.scores, place), *self.at, query, key)
        weight, to_logit = k.fresh("weight"), k.fresh("to_logit")
        k.line(f"{weight} = {self.literal(0)}")
        k.line(f"{to_logit} = {self.literal(0)}")
        with k.suite(f"if {query} < {self.queries} and {key} < {self.keys}:"):
            maximum, inverse, mean = (k.load(s, k.add(self.statistics_start, query)) for s in self.statistics)
            k.line(f"{weight} = {self.exp2(f'{score} - {maximum}')} * {inverse}")
            with k.suite(f"if {allowed}:"):
                k.line(f"{to_logit} = {weight} * ({to_weight} - {mean})")
        return weight, to_logit


class _Statistics(_Gradient):
    def __init__(self, plan: Plan, target):
        super().__init__(plan, target, [])

    def text(self) -> str:
        k, tile = self.k, self.tile
        tiles = k.let(k.ceil_div(self.queries, tile.rows), "tiles")
        with k.block_stride(k.let(k.product([self.batch, self.heads, tiles]), "total")) as number:
            batch, head, at = k.coordinates(number, [self.batch, self.heads, tiles])
            first_query = k.let(k.mul(at, tile.rows))
            self.head(batch, head, k.let(k.div(head, self.group)))
            # The first `rows` threads carry a row each.
            best, norm, mean = k.fresh("best"), k.fresh("norm"), k.fresh("mean")
            k.line(f"{best} = {self.literal(MASKED[self.dtype])}")
            k.line(f"{norm} = {self.literal(0)}")
            k.line(f"{mean} = {self.literal(0)}")
            with k.range(0, self.visible_keys(first_query), tile.rows) as first_key:
                self.tile_products(first_query, first_key)
                with self.elements(first_query, first_key) as (query, key, place):
                    score, _ = self.score(k.load(self.scores, place), *self.at, query, key)
                    k.store(self.scores, place, score)
                k.synchronise()
                with k.suite(f"if {self.thread} < {k.i(tile.rows)}:"):
                    self._row(best, norm, mean)
            query = k.let(k.add(first_query, self.thread))
            with k.suite(f"if {self.thread} < {k.i(tile.rows)} and {query} < {self.queries}:"):
                place = k.let(k.add(self.statistics_start, query))
                inverse = k.let(f"({self.literal(1)} / {norm} if {norm} != {self.literal(0)} else {self.literal(0)})")
                for operand, value in zip(self.statistics, (best, inverse, f"({mean} * {inverse})")):
                    k.store(operand, place, value)
        return k.text()

    def _row(self, best: str, norm: str, mean: str) -> None:
        """Takes one row of shared scores into a thread's statistics."""
        k, tile = self.k, self.tile
        first = k.let(k.mul(self.thread, tile.pitch), "first")
        before = k.fresh("before")
        k.line(f"{before} = {best}")
        with k.range(0, k.i(tile.rows), 1) as i:
            score = k.load(self.scores, k.add(first, i))
            k.line(f"{best} = ({score} if {score} > {best} else {best})")
        factor = k.let(self.exp2(f"{before} - {best}"))
        k.line(f"{norm} = {norm} * {factor}")
        k.line(f"{mean} = {mean} * {factor}")
        with k.range(0, k.i(tile.rows), 1) as i:
            weight = k.let(self.exp2(f"{k.load(self.scores, k.add(first, i))} - {best}"))
            k.line(f"{norm} = {norm} + {weight}")
            k.line(f"{mean} = {mean} + {weight} * {k.load(self.to_weights, k.add(first, i))}")


class _Queries(_Gradient):
    def __init__(self, plan: Plan, target):
        logits = [compute_dtype(plan.dtype)] if plan.bias is not None else []
        super().__init__(plan, target, [plan.dtype, *logits])
        self.sums = self.tiles.new_sums()

    def text(self) -> str:
        k, tile = self.k, self.tile
        tiles = k.let(k.ceil_div(self.queries, tile.rows), "tiles")
        parts = k.let(k.ceil_div(self.depth, tile.width), "parts")
        with k.block_stride(k.let(k.product([self.batch, self.heads, tiles, parts]), "total")) as number:
            batch, head, at, part = k.coordinates(number, [self.batch, self.heads, tiles, parts])
            first_query, first_column = k.let(k.mul(at, tile.rows)), k.let(k.mul(part, tile.width))
            self.head(batch, head, k.let(k.div(head, self.group)))
            self.tiles.clear(self.sums)
            # Every logit has a cotangent to store, if that of a bias is asked for.
            keys = self.keys if self.plan.bias is not None else self.visible_keys(first_query)
            with k.range(0, keys, tile.rows) as first_key:
                self.tile_products(first_query, first_key)
                with self.elements(first_query, first_key) as (query, key, place):
                    _, to_logit = self.weight(place, query, key)
                    k.store(self.to_weights, place, to_logit)
                    if self.plan.bias is not None:
                        with k.suite(f"if {part} == {k.i(0)} and {query} < {self.queries} and {key} < {self.keys}:"):
                            row = k.mul(k.add(self.statistics_start, query), self.keys)
                            k.store(self.results[1], k.add(row, key), to_logit)
                self.tiles.pack(self.to_weights)
                self.tiles.weigh(self.sums, self.to_weights, self.rows_of("key", first_key), first_column)
            rows, scale = self.rows_of("query", first_query), self.literal(self.plan.scale)
            self.store_sums(self.results[0], self.sums, rows, first_column, lambda total, _: f"({total} * {scale})")
        return k.text()


class _Keys(_Gradient):
    def __init__(self, plan: Plan, target):
        super().__init__(plan, target, [plan.dtype, plan.dtype])
        self.to_key, self.to_value = self.tiles.new_sums(), self.tiles.new_sums()

    def text(self) -> str:
        k, tile = self.k, self.tile
        tiles = k.let(k.ceil_div(self.keys, tile.rows), "tiles")
        widest = f"({self.depth} if {self.depth} > {self.value_depth} else {self.value_depth})"
        parts = k.let(k.ceil_div(k.let(widest), tile.width), "parts")
        with k.block_stride(k.let(k.product([self.batch, self.key_heads, tiles, parts]), "total")) as number:
            batch, key_head, at, part = k.coordinates(number, [self.batch, self.key_heads, tiles, parts])
            first_key, first_column = k.let(k.mul(at, tile.rows)), k.let(k.mul(part, tile.width))
            self.tiles.clear(self.to_key)
            self.tiles.clear(self.to_value)
            first_head = k.let(k.mul(key_head, self.group))
            # Without a mask, queries before the first key give no weight to any of these.
            start = first_key if self.plan.is_causal and self.plan.mask is None else k.i(0)
            with k.range(first_head, k.let(k.add(first_head, self.group)), 1) as head:
                self.head(batch, head, key_head)
                with k.range(start, self.queries, tile.rows) as first_query:
                    self._queries(first_query, first_key, first_column)
            self.head(batch, first_head, key_head)
            scale = self.literal(self.plan.scale)
            to_key, to_value = self.results
            rows = self.rows_of("key", first_key)
            self.store_sums(to_key, self.to_key, rows, first_column, lambda total, _: f"({total} * {scale})")
            self.store_sums(
                to_value, self.to_value, self.rows_of("value", first_key), first_column, lambda total, _: total
            )
        return k.text()

    def _queries(self, first_query: str, first_key: str, first_column: str) -> None:
        """Adds what a tile of queries contributes."""
        k = self.k
        self.tile_products(first_query, first_key)
        with self.elements(first_query, first_key) as (query, key, place):
            weight, to_logit = self.weight(place, query, key)
            k.store(self.scores, place, weight)
            k.store(self.to_weights, place, to_logit)
        for sums, weights, rows in (
            (self.to_value, self.scores, self.rows_of("cotangent", first_query)),
            (self.to_key, self.to_weights, self.rows_of("query", first_query)),
        ):
            self.tiles.pack(weights, transposed=True)
            self.tiles.weigh(sums, weights, rows, first_column, transposed=True)
