"""What the kernels of attention and of its gradient are made of: panels in shared memory, tiles of scores.

A block of `side` x `side` threads works on tiles of queries and keys of one head. A thread has the scores of queries
and keys that lie `side` apart, so that neighbouring threads have neighbouring keys. Operands come through shared memory
in panels of `chunk` elements along the sum. Sizes and strides are run-time values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from kgraph.codegen.attention import LOG2E, MASKED, extra_strides
from kgraph.codegen.cuda import scalar_ops
from kgraph.codegen.cuda.source import KernelSource, Operand, index_type
from kgraph.codegen.cuda.tiles import Panel
from kgraph.codegen.expressions import compute_dtype
from kgraph.codegen.strided import SizeTable
from kgraph.ir import Dim, Node


class Tile(NamedTuple):
    """side: threads along each axis of the block. rows: queries of a tile, and keys. chunk: elements of a panel along
    the sum. width: columns of sums that a block keeps."""

    side: int
    rows: int
    chunk: int
    width: int

    @property
    def block(self) -> int:
        return self.side * self.side

    @property
    def pitch(self) -> int:
        """Distance of rows of scores: threads that read down a column use different banks."""
        return self.rows + 1


def choose_tile(dtype: str, depth, target, chunk: int = 16) -> Tile:
    """The tile for sums of `depth` columns (int | Dim), with panels of `chunk` elements (on a GPU)."""
    if target.simulator:
        return Tile(2, 4, 2, 4)
    width = next((w for w in (32, 64) if isinstance(depth, int) and depth <= w), 64 if isinstance(depth, Dim) else 128)
    return Tile(16, 32 if dtype == "float64" else 64, chunk, width)


class Plan(NamedTuple):
    """Params of the renderers. dtype: of q. mask, bias: strides along (batch, heads, queries, keys), or None."""

    name: str
    tile: Tile
    dtype: str
    scale: float
    is_causal: bool
    mask: tuple | None
    bias: tuple | None
    indices: str
    num_sizes: int


def plan_of(name: str, node: Node, tile: Tile, operands: Sequence) -> tuple[Plan, list]:
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
    return Plan(name, tile, q.dtype, *flags, mask, bias, indices, len(table.values)), table.values


class Rows(NamedTuple):
    """Rows of an operand: from `start` on, `stride` apart, `depth` elements each. first: the tile's. limit: their
    number; what lies behind counts as 0."""

    operand: Operand
    start: str
    stride: str
    first: str
    limit: str
    depth: str


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
        self.row = k.let(k.div(self.thread, self.tile.side), "row")
        self.column = k.let(k.mod(self.thread, self.tile.side), "column")
        self.group = k.let(k.div(self.heads, self.key_heads), "group")
        self.query_stride = k.let(k.mul(self.heads, self.depth), "stride")
        self.key_stride = k.let(k.mul(self.key_heads, self.depth), "stride")
        self.value_stride = k.let(k.mul(self.key_heads, self.value_depth), "stride")
        self.result_stride = k.let(k.mul(self.heads, self.value_depth), "stride")
        self.scores = self.shared(self.tile.rows * self.tile.pitch)
        tile, block = self.tile, self.tile.block
        self._left, self._right = (self.shared(tile.chunk * tile.pitch) for _ in range(2))
        self._rows = self.shared(tile.chunk * tile.width)
        self._sides = [Panel(k, block, tile.rows, tile.chunk, False, self.dtype) for _ in range(2)]
        self._panel = Panel(k, block, tile.chunk, tile.width, False, self.dtype)
        # Registers for the products of a tile, and for the factors of one step.
        height = tile.rows // tile.side
        self._products = k.local(self.dtype, height * height)
        self._xs, self._ys = k.local(self.dtype, height), k.local(self.dtype, max(height, tile.width // tile.side))

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

    # -- sums ---------------------------------------------------------------------------------------------------------
    def new_sums(self) -> Operand:
        """Registers for a thread's sums of `width` columns."""
        return self.k.local(self.dtype, self.tile.rows // self.tile.side * (self.tile.width // self.tile.side))

    def clear(self, sums: Operand, count: int) -> None:
        """Sets registers to 0."""
        with self.k.range(0, self.k.i(count), 1) as n:
            self.k.store(sums, n, self.literal(0))

    def clear_sums(self, sums: Operand) -> None:
        self.clear(sums, self.tile.rows // self.tile.side * (self.tile.width // self.tile.side))

    def products(self, x: Rows, y: Rows, into: Operand) -> None:
        """Leaves the products of rows of queries and of keys in shared memory: a thread's own in `elements`."""
        k, tile, height = self.k, self.tile, self.tile.rows // self.tile.side
        sides = list(zip(self._sides, (self._left, self._right), (x, y)))
        self.clear(self._products, height * height)
        with k.range(0, x.depth, tile.chunk) as first:
            for panel, _, rows in sides:
                with panel.each() as (n, row, at):
                    self._fetch(panel, n, rows, row, k.add(first, at))
            k.synchronise()
            for panel, shared, _ in sides:
                with panel.each() as (n, row, at):
                    k.store(shared, k.add(k.mul(at, tile.pitch), row), k.load(panel.fetched, n))
            k.synchronise()
            with k.range(0, k.i(tile.chunk), 1) as d:
                left, right = (k.let(k.add(k.mul(d, tile.pitch), at)) for at in (self.row, self.column))
                self._multiply(self._products, height, (self._left, left, 1), (self._right, right))
        k.synchronise()
        for i in range(height):
            row = k.let(k.mul(k.add(self.row, i * tile.side), tile.pitch))
            with k.range(0, k.i(height), 1) as j:
                place = k.add(row, k.add(self.column, k.mul(j, tile.side)))
                k.store(into, place, k.load(self._products, k.add(j, i * height)))

    def _fetch(self, panel: Panel, n: str, rows: Rows, row: str, element: str) -> None:
        """Sets a register of a panel to an element of a row, or to 0."""
        k = self.k
        number, element = k.let(k.add(rows.first, row)), k.let(element)
        place = lambda: k.add(rows.start, k.add(k.mul(number, rows.stride), element))
        panel.fetch(n, [f"{number} < {rows.limit}", f"{element} < {rows.depth}"], rows.operand, place)

    def _multiply(self, sums: Operand, width: int, left: tuple, right: tuple) -> None:
        """Adds the products of what a thread's rows and columns have at one step of the sum.

        left, right: (shared array, place of the first one), and for rows their distance.
        """
        k, side, height = self.k, self.tile.side, self.tile.rows // self.tile.side
        with k.range(0, k.i(height), 1) as i:
            k.store(self._xs, i, k.load(left[0], k.add(left[1], k.mul(i, side * left[2]))))
        with k.range(0, k.i(width), 1) as j:
            k.store(self._ys, j, k.load(right[0], k.add(right[1], k.mul(j, side))))
        with k.range(0, k.i(height), 1) as i, k.range(0, k.i(width), 1) as j:
            n = k.let(k.add(k.mul(i, width), j))
            k.store(sums, n, f"{k.load(sums, n)} + {k.load(self._xs, i)} * {k.load(self._ys, j)}")

    def weigh(self, sums: Operand, weights: Operand, rows: Rows, first_column: str, transposed: bool = False) -> None:
        """Adds a shared tile [queries, keys], or its transpose, times rows of an operand to `sums`: their elements
        from `first_column` on."""
        k, tile = self.k, self.tile
        with k.range(0, k.i(tile.rows), tile.chunk) as first:
            with self._panel.each() as (n, at, column):
                self._fetch(self._panel, n, rows, k.add(first, at), k.add(first_column, column))
            k.synchronise()
            with self._panel.each() as (n, at, column):
                k.store(self._rows, k.add(k.mul(at, tile.width), column), k.load(self._panel.fetched, n))
            k.synchronise()
            with k.range(0, k.i(tile.chunk), 1) as d:
                at = k.add(first, d)
                if transposed:
                    left, step = k.let(k.add(k.mul(at, tile.pitch), self.row)), 1
                else:
                    left, step = k.let(k.add(k.mul(self.row, tile.pitch), at)), tile.pitch
                right = k.let(k.add(k.mul(d, tile.width), self.column))
                self._multiply(sums, tile.width // tile.side, (weights, left, step), (self._rows, right))

    # -- scores -------------------------------------------------------------------------------------------------------
    @contextmanager
    def elements(self, first_row: str, first_column: str) -> Iterator[tuple[str, str, str]]:
        """A loop over what a thread left of a tile of products: (row, column, place in shared memory)."""
        k, tile, height = self.k, self.tile, self.tile.rows // self.tile.side
        with k.range(0, k.i(height * height), 1) as n:
            row = k.let(k.add(self.row, k.mul(k.div(n, height), tile.side)), "row")
            column = k.let(k.add(self.column, k.mul(k.mod(n, height), tile.side)), "column")
            place = k.let(k.add(k.mul(row, tile.pitch), column), "place")
            yield k.let(k.add(first_row, row)), k.let(k.add(first_column, column)), place

    def store_sums(
        self, result: Operand, sums: Operand, rows: Rows, first_column: str, value: Callable[[str, str], str]
    ) -> None:
        """Stores sums as elements of rows from `first_column` on. value: from (sum, row of the tile)."""
        k, tile, width = self.k, self.tile, self.tile.width // self.tile.side
        for i in range(tile.rows // tile.side):
            row = k.let(k.add(self.row, i * tile.side), "row")
            number = k.let(k.add(rows.first, row))
            with k.range(0, k.i(width), 1) as j:
                total = k.load(sums, k.add(j, i * width))
                column = k.let(k.add(first_column, k.add(self.column, k.mul(j, tile.side))))
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
