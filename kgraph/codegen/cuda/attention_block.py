"""What the kernels of attention and of its gradient are made of: panels in shared memory, tiles of scores.

A block of `side` x `side` threads works on tiles of queries and keys of one head. A thread has the scores of queries
and keys that lie `side` apart, so that neighbouring threads have neighbouring keys. Operands come through shared memory
in panels of `chunk` elements along the sum. Sizes and strides are run-time values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from kgraph.codegen.attention import LOG2E, MASKED, extra_strides
from kgraph.codegen.cuda import scalar_ops
from kgraph.codegen.cuda.source import KernelSource, Operand, index_type
from kgraph.codegen.cuda.tiles import panel_places
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


def choose_tile(dtype: str, depth, target) -> Tile:
    """The tile for sums of `depth` columns (int | Dim)."""
    if target.simulator:
        return Tile(2, 4, 2, 4)
    width = next((w for w in (32, 64) if isinstance(depth, int) and depth <= w), 64 if isinstance(depth, Dim) else 128)
    return Tile(16, 32 if dtype == "float64" else 64, 16, width)


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
        self._left, self._right = (self.shared(self.tile.chunk * self.tile.pitch) for _ in range(2))
        self._panel = self.shared(self.tile.chunk * self.tile.width)

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

    # -- panels -------------------------------------------------------------------------------------------------------
    def _fill(self, shared: Operand, index: str, rows: Rows, row: str, element: str) -> None:
        """shared[index] = an element of a row, or 0."""
        k, value = self.k, self.k.fresh()
        k.line(f"{value} = {self.literal(0)}")
        with k.suite(f"if {row} < {rows.limit} and {element} < {rows.depth}:"):
            place = k.add(rows.start, k.add(k.mul(row, rows.stride), element))
            k.line(f"{value} = {scalar_ops.from_memory(f'{rows.operand.name}[{place}]', rows.operand.dtype)}")
        k.store(shared, index, value)

    def products(self, x: Rows, y: Rows) -> list[list[str]]:
        """The products of rows of queries and of keys, in registers."""
        k, tile = self.k, self.tile
        sums = self.new_sums(tile.rows)
        with k.range(0, x.depth, tile.chunk) as first:
            k.synchronise()
            for shared, rows in ((self._left, x), (self._right, y)):
                for row, at in panel_places(k, self.thread, tile.block, tile.rows, tile.chunk):
                    number, element = k.let(k.add(rows.first, row)), k.let(k.add(first, at))
                    self._fill(shared, k.add(k.mul(at, tile.pitch), row), rows, number, element)
            k.synchronise()
            with k.range(0, k.i(tile.chunk), 1) as d:
                left, right = (k.let(k.add(k.mul(d, tile.pitch), at)) for at in (self.row, self.column))
                self._multiply(
                    sums, lambda i: k.load(self._left, k.add(left, i)), lambda j: k.load(self._right, k.add(right, j))
                )
        return sums

    def new_sums(self, columns: int) -> list[list[str]]:
        """Variables for the sums of a tile of `columns`, set to 0."""
        k, side = self.k, self.tile.side
        sums = [[k.fresh("sum") for _ in range(columns // side)] for _ in range(self.tile.rows // side)]
        for name in (n for row in sums for n in row):
            k.line(f"{name} = {self.literal(0)}")
        return sums

    def _multiply(self, sums: list[list[str]], left: Callable[[int], str], right: Callable[[int], str]) -> None:
        side = self.tile.side
        ys = [right(j * side) for j in range(len(sums[0]))]
        for i, row in enumerate(sums):
            x = left(i * side)
            for name, y in zip(row, ys):
                self.k.line(f"{name} = {name} + {x} * {y}")

    def weigh(self, sums: list[list[str]], rows: Rows, first_column: str, transposed: bool = False) -> None:
        """Adds the shared scores, or their transpose, times rows of an operand to `sums`: its elements from
        `first_column` on."""
        k, tile = self.k, self.tile
        with k.range(0, k.i(tile.rows), tile.chunk) as first:
            k.synchronise()
            for at, column in panel_places(k, self.thread, tile.block, tile.chunk, tile.width):
                number = k.let(k.add(rows.first, k.add(first, at)))
                element = k.let(k.add(first_column, column))
                self._fill(self._panel, k.add(k.mul(at, tile.width), column), rows, number, element)
            k.synchronise()
            with k.range(0, k.i(tile.chunk), 1) as d:
                at = k.add(first, d)
                if transposed:
                    left, step = k.let(k.add(k.mul(at, tile.pitch), self.row)), 1
                else:
                    left, step = k.let(k.add(k.mul(self.row, tile.pitch), at)), tile.pitch
                right = k.let(k.add(k.mul(d, tile.width), self.column))
                self._multiply(
                    sums,
                    lambda i: k.load(self.scores, k.add(left, i * step)),
                    lambda j: k.load(self._panel, k.add(right, j)),
                )

    # -- scores -------------------------------------------------------------------------------------------------------
    def each(self, sums: list[list[str]], first_row: str, first_column: str):
        """(sum, row, column, place among the shared scores) of every element of a tile that a thread has."""
        k, tile = self.k, self.tile
        for i, names in enumerate(sums):
            row = k.let(k.add(self.row, i * tile.side), "row")
            for j, name in enumerate(names):
                column = k.let(k.add(self.column, j * tile.side), "column")
                place = k.let(k.add(k.mul(row, tile.pitch), column), "place")
                yield name, k.let(k.add(first_row, row)), k.let(k.add(first_column, column)), place

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
