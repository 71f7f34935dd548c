"""What the kernels of attention and of its gradient are made of: where operands lie, scores from products, results.

A block works on tiles of queries and keys of one head, whose products are those of `attention_tiles`. Sizes and strides
are run-time values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from kgraph.codegen.attention import LOG2E, MASKED, extra_strides
from kgraph.codegen.cuda import scalar_ops
from kgraph.codegen.cuda.attention_tiles import Rows, Tile, tiles_for
from kgraph.codegen.cuda.source import KernelSource, Operand, index_type
from kgraph.codegen.expressions import compute_dtype
from kgraph.codegen.strided import SizeTable
from kgraph.ir import Node


class Plan(NamedTuple):
    """Params of the renderers. dtype: of q. mask, bias: strides along (batch, heads, queries, keys), or None. tensor:
    the instruction of tensor cores, if they multiply."""

    name: str
    tile: Tile
    dtype: str
    scale: float
    is_causal: bool
    mask: tuple | None
    bias: tuple | None
    indices: str
    num_sizes: int
    tensor: str = ""


def plan_of(name: str, node: Node, tile: Tile, operands: Sequence, tensor: str = "") -> tuple[Plan, list]:
    """The plan of a kernel for an attention node or its gradient, and the sizes that it is launched with."""
    q, k, v, *rest = node.inputs
    (batch, queries, heads, depth), (keys, key_heads) = q.shape, k.shape[1:3]
    table = SizeTable()
    for size in (batch, queries, keys, heads, key_heads, depth, v.shape[3]):
        table.run_time(size)
    stride = lambda n: n if isinstance(n, int) and n in (0, 1) else table.run_time(n)
    strides = lambda value: tuple(map(stride, extra_strides(value)))
    mask = strides(rest.pop(0)) if node.attrs["has_mask"] else None
    bias = strides(rest.pop(0)) if node.attrs["has_bias"] else None
    indices = index_type([o.type.size for o in operands])
    flags = float(node.attrs["scale"]), bool(node.attrs["is_causal"])
    return Plan(name, tile, q.dtype, *flags, mask, bias, indices, len(table.values), tensor), table.values


class AttentionBlock:
    """The code of a block. Methods write what all threads of it do together."""

    def __init__(self, plan: Plan, target, operands: Callable[[KernelSource], None]):
        """operands: adds the operands behind q, k, v, mask and bias."""
        self.plan, self.tile = plan, Tile(*plan.tile)
        self.dtype = compute_dtype(plan.dtype)
        self.k = k = KernelSource(plan.name, target, self.tile.block, plan.indices)
        self.query, self.key, self.value = (k.operand(plan.dtype) for _ in range(3))
        self.mask = k.operand("bool") if plan.mask is not None else None
        self.bias = k.operand(plan.dtype) if plan.bias is not None else None
        operands(k)
        self.slots = [k.size() for _ in range(plan.num_sizes)]
        self.batch, self.queries, self.keys, self.heads, self.key_heads, self.depth, self.value_depth = self.slots[:7]
        self.thread = k.thread()
        self.group = k.let(k.div(self.heads, self.key_heads), "group")
        self.query_stride = k.let(k.mul(self.heads, self.depth), "stride")
        self.key_stride = k.let(k.mul(self.key_heads, self.depth), "stride")
        self.value_stride = k.let(k.mul(self.key_heads, self.value_depth), "stride")
        self.result_stride = k.let(k.mul(self.heads, self.value_depth), "stride")
        self.tiles = tiles_for(k, self.tile, plan.dtype, plan.tensor)
        self.scores = self.tiles.scores

    def shared(self, count: int) -> Operand:
        return self.k.shared(self.dtype, count)

    def literal(self, value) -> str:
        return self.k.literal(value, self.dtype)

    def start(self, batch: str, rows: str, heads: str, head: str, depth: str) -> str:
        """Where a head's first row of an operand [batch, rows, heads, depth] lies."""
        k = self.k
        return k.let(k.add(k.mul(k.mul(k.mul(batch, rows), heads), depth), k.mul(head, depth)), "start")

    def visible_keys(self, first_query: str) -> str:
        """How many keys a tile of queries can give weight to."""
        k = self.k
        if not self.plan.is_causal or self.plan.mask is not None:
            return self.keys  # with a mask a row may see no key at all, and weighs all of them alike
        end = k.add(first_query, self.tile.rows)
        return k.let(f"({end} if {end} < {self.keys} else {self.keys})", "visible")

    # -- scores -------------------------------------------------------------------------------------------------------
    @contextmanager
    def elements(self, first_row: str, first_column: str) -> Iterator[tuple[str, str, str]]:
        """A loop over what a thread left of a tile of products: (row, column, place in shared memory)."""
        k, across = self.k, self.tiles.across
        with k.range(0, k.i(self.tiles.height * across), 1) as n:
            row, column = self.tiles.score_place(k.div(n, across), k.mod(n, across))
            row, column = k.let(row, "row"), k.let(column, "column")
            place = k.let(k.add(k.mul(row, self.tile.pitch), column), "place")
            yield k.let(k.add(first_row, row)), k.let(k.add(first_column, column)), place

    def store_sums(
        self, result: Operand, sums: Operand, rows: Rows, first_column: str, value: Callable[[str, str], str]
    ) -> None:
        """Stores sums as elements of rows from `first_column` on. value: from (sum, row of the tile)."""
        k, width = self.k, self.tiles.width
        for i in range(self.tiles.height):
            row = k.let(self.tiles.sum_place(i, 0)[0], "row")
            number = k.let(k.add(rows.first, row))
            with k.range(0, k.i(width), 1) as j:
                total = k.load(sums, k.add(j, i * width))
                column = k.let(k.add(first_column, self.tiles.sum_place(i, j)[1]))
                with k.suite(f"if {number} < {rows.limit} and {column} < {rows.depth}:"):
                    k.store(result, k.add(rows.start, k.add(k.mul(number, rows.stride), column)), value(total, row))

    def score(self, total: str, batch: str, head: str, query: str, key: str) -> tuple[str, str]:
        """(score, whether the key is not masked) from a product; -inf and False where there is no such query or key."""
        k, plan = self.k, self.plan
        score, allowed = k.fresh("score"), k.fresh("allowed")
        k.line(f"{score} = {self.literal('-inf')}")
        k.line(f"{allowed} = False")
        with k.suite(f"if {query} < {self.queries} and {key} < {self.keys}:"):
            k.line(f"{score} = {total} * {self.literal(plan.scale * LOG2E)}")
            k.line(f"{allowed} = True")
            if self.bias is not None:
                bias = k.load(self.bias, self._extra(plan.bias, batch, head, query, key))
                k.line(f"{score} = {score} + {bias} * {self.literal(LOG2E)}")
            if plan.is_causal:
                k.line(f"{allowed} = {key} <= {query}")
            if self.mask is not None:
                unmasked = k.load(self.mask, self._extra(plan.mask, batch, head, query, key))
                k.line(f"{allowed} = {allowed} and {unmasked}")
            if plan.is_causal or self.mask is not None:
                k.line(f"{score} = ({score} if {allowed} else {self.literal(MASKED[self.dtype])})")
        return score, allowed

    def _extra(self, strides: tuple | None, *coordinates: str) -> str:
        """Where a mask or bias has its element for (batch, head, query, key)."""
        k, out = self.k, ""
        for at, stride in zip(coordinates, strides or ()):
            if stride == 0:
                continue
            step = at if stride == 1 else k.mul(at, self.slots[stride[1]])
            out = k.add(out, step) if out else step
        return out or k.i(0)

    def exp2(self, x: str) -> str:
        return f"exp2{scalar_ops.suffix(self.dtype)}({x})"
