"""Matrix products: `dot_general` of any layout as batches of A[M, K] x B[K, N], with a fused epilogue.

A block of threads makes a tile of results, see `tiles`. Both operands are read where they lie: neighbouring threads
fetch along the axis on which the elements are neighbours, and shared memory turns them. Axes that do not collapse into
one are taken apart in index arithmetic. Sizes and strides are run-time values; the code depends on the tile, the
dtypes, the epilogue and on which strides are 1.

Where there are few tiles and K is long, K is cut: a first kernel leaves the sums of every piece, a second adds them in
order and applies the epilogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kgraph.codegen.contractions import Axes, Parts, accumulate_dtype, has_products, take_apart
from kgraph.codegen.cuda import reduce
from kgraph.codegen.cuda.epilogue import Finish
from kgraph.codegen.cuda.library import SPANS, epilogue_after, held_output, offer
from kgraph.codegen.cuda.mma import instruction_for
from kgraph.codegen.cuda.pieces import sum_of_pieces
from kgraph.codegen.cuda.source import KernelSource, Operand, index_type
from kgraph.codegen.cuda.tensor_cores import tile_product
from kgraph.codegen.cuda.tiles import SIMULATED_TENSOR_TILE, Panel, Side, Tile, group_of
from kgraph.codegen.expressions import compute_dtype
from kgraph.codegen.kernel import KernelCall, KernelSpec, Launch, LibraryCall, Temporary
from kgraph.codegen.reductions import Parts as Reduction
from kgraph.codegen.regions import Leaf
from kgraph.codegen.strided import SizeTable, collapse, collapse_streams, dense_strides
from kgraph.ir import Dim, Node, TensorType, Value
from kgraph.ir.dims import ceil_div, product
from kgraph.runtime.steps import Matrix
from kgraph.runtime.steps import Product as LibraryProduct

TEMPLATE = "kgraph.codegen.cuda.gemm:render"
LARGE, MIDDLE = Tile(128, 128, 16, 8, 8), Tile(64, 64, 16, 8, 4)
FLAT, TALL = Tile(16, 128, 16, 2, 4), Tile(128, 16, 16, 4, 2)
SIMULATED = Tile(4, 4, 2, 2, 2)
FEW = 32  # rows or columns up to which tiles are flat or tall
WAVES = 2  # blocks per multiprocessor below which K is cut
CHUNKS = 16  # chunks of a tile's depth that a piece of K has at least; 2 in the simulator
LIBRARY_DTYPES = ("float16", "bfloat16", "float32", "float64")


def accepts(node: Node) -> str | None:
    """None where `lower` takes the node, else why not."""
    parts = take_apart(node, "dot_general")
    if isinstance(parts, str):
        return parts
    if any(parts.packed):
        return "packed operands are for processors"
    if not has_products(parts.node.inputs[0].dtype):
        return f"no products of {parts.node.inputs[0].dtype}"
    return None


class Sides(NamedTuple):
    """An operand as matrices. value: what is read. rows, columns: collapsed axes (size, stride) of each side."""

    value: Value
    rows: list[tuple]
    columns: list[tuple]


class Product(NamedTuple):
    """A dot_general as batches of A[M, K] x B[K, N]. batch: axes (size, (stride in A, stride in B))."""

    batch: list[tuple]
    a: Sides
    b: Sides
    entries: int | Dim
    rows: int | Dim
    columns: int | Dim
    depth: int | Dim


def product_of(parts: Parts) -> Product:
    """The product behind a dot_general that was taken apart."""
    axes = Axes(parts.node)
    lhs, rhs = (v.shape for v in parts.node.inputs)
    left, right = dense_strides(lhs), dense_strides(rhs)
    pairs = list(zip(axes.lhs_batch, axes.rhs_batch))
    sizes = lambda shape, of: product([shape[a] for a in of])
    side = lambda shape, strides, of: collapse((shape[a], strides[a]) for a in of)
    return Product(
        collapse_streams((lhs[x], (left[x], right[y])) for x, y in pairs),
        Sides(parts.operands[0], side(lhs, left, axes.lhs_free), side(lhs, left, axes.lhs_contract)),
        Sides(parts.operands[1], side(rhs, right, axes.rhs_contract), side(rhs, right, axes.rhs_free)),
        sizes(lhs, axes.lhs_batch),
        sizes(lhs, axes.lhs_free),
        sizes(rhs, axes.rhs_free),
        sizes(lhs, axes.lhs_contract),
    )


def lower(node: Node, target) -> list[KernelCall]:
    """The call of a product, or two where K is cut; see the module's docstring."""
    parts = take_apart(node, "dot_general")
    if isinstance(parts, str):
        raise ValueError(f"{node.name}: {parts}")
    return lower_parts(parts, target)


def lower_parts(parts: Parts, target) -> list[KernelCall]:
    """The calls of a dot_general that was taken apart."""
    p = product_of(parts)
    accumulate = accumulate_dtype(p.a.value.dtype, parts.result.dtype)
    tensor = instruction_for(p.a.value.dtype, accumulate, target)
    tile = choose_tile(p, accumulate, target, tensor)
    library = library_call(parts, p, target) if target.products else None
    divisible = accumulate == compute_dtype(parts.result.dtype)
    pieces = _pieces(p, tile, target) if divisible else 1
    name = "gemm" + parts.name
    if pieces == 1:
        extras, finish = [v for _, v in parts.extras], Finish.params(parts, accumulate)
        calls = [_call(name, parts, p, tile, tensor, 1, extras, parts.outputs, finish)]
    else:
        partial = Temporary(TensorType((pieces, p.entries, p.rows, p.columns), accumulate))
        untouched = (accumulate, accumulate, (), (accumulate,), None)
        first = _call("gemm_partial", parts, p, tile, tensor, pieces, [], [partial], untouched)
        calls = [first, *reduce.lower_parts(_sum_of_pieces(parts, partial), target)]
    return calls if library is None else offer(calls, library)


def library_call(parts: Parts, p: Product, target) -> LibraryCall | None:
    """What a library may do for the node, with an epilogue behind it if the library does not know that.

    None where it does not know the dtypes, or an operand is no matrix with a single stride along each side.
    """
    dtype, result = p.a.value.dtype, parts.result.dtype
    if dtype not in LIBRARY_DTYPES or (result != dtype and (dtype == "float64" or result != "float32")):
        return None
    if len(p.batch) > 1 or any(len(axes) > 1 for m in (p.a, p.b) for axes in (m.rows, m.columns)):
        return None
    held = held_output(parts, wide=True)
    strides = [[axes[0][1] if axes else 1 for axes in (m.rows, m.columns)] for m in (p.a, p.b)]
    batch = p.batch[0][1] if p.batch else (0, 0)
    known = _library_epilogue(parts, held.type.dtype)
    bias, added = known or (None, None)
    asked = LibraryProduct(
        Matrix(0, strides[0][0], strides[0][1], batch[0]),
        Matrix(1, strides[1][0], strides[1][1], batch[1]),
        2 + len(parts.extras),
        bias,
        added,
        (p.entries, p.rows, p.columns, p.depth),
        dtype,
        held.type.dtype,
        target.tf32,
    )
    operands = [p.a.value, p.b.value, *(v for _, v in parts.extras), held]
    shape = (p.entries, p.rows, p.columns)
    after = [] if known is not None else epilogue_after(parts, held, shape, target)
    return LibraryCall(asked, operands, after=after)


def _library_epilogue(parts: Parts, written: str) -> tuple[int | None, int | None] | None:
    """The positions of a bias and of an added operand if the epilogue is no more than that, all of dtype `written`.

    Activations are not the library's: what its ReLU makes of NaN, and how exact its GELU is, is not documented.
    """
    if parts.expression is None:
        return None, None
    _, instructions, outputs = parts.expression
    first = 1 + len(parts.extras)  # number of the first instruction's result
    if len(outputs) != 1 or outputs[0] != first + len(instructions) - 1:
        return None
    found: dict[str, int] = {}
    current = 0
    for number, (op, operands, _, dtype) in enumerate(instructions):
        if op not in ("add", "convert") or current not in operands or dtype != written:
            return None
        if op == "add":
            (other,) = [o for o in operands if o != current] or [current]
            if not 1 <= other < first:
                return None
            kind, value = parts.extras[other - 1]
            if kind not in ("channel", "full") or kind in found or value.dtype != written:
                return None
            found[kind] = other + 1  # behind both factors
        current = first + number
    return found.get("channel"), found.get("full")


def _sum_of_pieces(parts: Parts, partial: Temporary) -> Reduction:
    """The reduction that adds up the pieces and applies the epilogue."""
    extras = [Leaf(value, value.dtype, (False, *SPANS[kind])) for kind, value in parts.extras]
    return sum_of_pieces(partial, parts.result.dtype, parts.outputs, extras, parts.expression)


def choose_tile(p: Product, accumulate: str, target, instruction: str = "") -> Tile:
    """The tile for a product; sizes that are not known count as many.

    instruction: of tensor cores, if they multiply."""
    if target.simulator:
        return SIMULATED_TENSOR_TILE if instruction else SIMULATED
    if isinstance(p.rows, int) and p.rows <= FEW:
        return FLAT
    if isinstance(p.columns, int) and p.columns <= FEW:
        return TALL
    if accumulate in ("float64", "int64"):
        return MIDDLE
    blocks = p.entries * ceil_div(p.rows, LARGE.rows) * ceil_div(p.columns, LARGE.columns)
    enough = isinstance(blocks, Dim) or blocks >= target.num_sms
    wide = all(isinstance(n, Dim) or n >= 96 for n in (p.rows, p.columns))
    return LARGE if enough and wide else MIDDLE


def _pieces(p: Product, tile: Tile, target) -> int:
    """Into how many pieces K is cut."""
    tiles = p.entries * ceil_div(p.rows, tile.rows) * ceil_div(p.columns, tile.columns)
    if isinstance(tiles, Dim) or tiles == 0:
        return 1
    least = tile.depth * (2 if target.simulator else CHUNKS)
    pieces = WAVES * target.num_sms // tiles
    if isinstance(p.depth, int):
        pieces = min(pieces, p.depth // least)
    return max(pieces, 1)


def _call(
    name: str,
    parts: Parts,
    p: Product,
    tile: Tile,
    tensor: str,
    pieces: int,
    extras: Sequence[Value],
    outputs: Sequence[Value | Temporary],
    finish: tuple,
) -> KernelCall:
    """The call of a kernel that makes `outputs`: the sums of pieces of K, or the finished results."""
    table = SizeTable()
    stride = lambda n: 1 if isinstance(n, int) and n == 1 else table.run_time(n)
    axes = lambda of: tuple((table.run_time(n), stride(t)) for n, t in of)
    piece = p.depth if pieces == 1 else ceil_div(p.depth, pieces * tile.depth) * tile.depth
    operands = [p.a.value, p.b.value, *extras, *outputs]
    plan = Plan(
        name=name,
        tile=tile,
        tensor=tensor,
        dtypes=(p.a.value.dtype, p.b.value.dtype),
        finish=finish,
        sizes=tuple(table.run_time(n) for n in (p.entries, p.rows, p.columns, p.depth, pieces, piece)),
        batch=tuple((table.run_time(n), tuple(map(stride, strides))) for n, strides in p.batch),
        a=(axes(p.a.rows), axes(p.a.columns)),
        b=(axes(p.b.rows), axes(p.b.columns)),
        indices=index_type([o.type.size for o in operands]),
        num_sizes=len(table.values),
        sides=_sides(p),
    )
    return KernelCall(
        spec=KernelSpec(name, TEMPLATE, tuple(plan)),
        operands=operands,
        outputs=len(outputs),
        sizes=table.values,
        extent=pieces * p.entries * ceil_div(p.rows, tile.rows) * ceil_div(p.columns, tile.columns),
        flops=2 * p.entries * p.rows * p.columns * p.depth,
        bytes=sum((o.type.nbytes for o in dict.fromkeys(operands)), start=0),
        notes={"algorithm": "gemm", "inplace": parts.inplace(2) if pieces == 1 else ()},
        launch=Launch(tile.block),
    )


def _sides(p: Product) -> tuple[Side, Side]:
    """How the operands are fetched: along the axis on which their elements are neighbours."""
    unit = lambda axes: bool(axes) and axes[-1][1] == 1
    by_rows = unit(p.a.rows)
    by_columns = unit(p.b.columns) or not unit(p.b.rows)
    near = (p.a.rows if by_rows else p.a.columns, p.b.columns if by_columns else p.b.rows)
    groups = []
    for n, (sides, along) in enumerate(((p.a, near[0]), (p.b, near[1]))):
        if not unit(along):
            groups.append(1)
            continue
        steps = [
            stride for axes in (sides.rows, sides.columns) for _, stride in axes if axes is not along or stride != 1
        ]
        steps += [strides[n] for _, strides in p.batch]
        groups.append(group_of(sides.value.dtype, along[-1][0], *steps))
    return Side(by_rows, groups[0]), Side(by_columns, groups[1])


# -- the kernel -------------------------------------------------------------------------------------------------------
class Plan(NamedTuple):
    """Params of `render`. Sizes are ("size", slot), strides that or 1.

    tensor: instruction of tensor cores, or "". dtypes: of A and B. finish: params of `Finish`. sizes: of the batch, M,
    N, K, the number of pieces, the length of a piece. batch: (size, strides in A and B). a: axes (size, stride) of M
    and of K; b: of K and of N. indices: their type. num_sizes: how many there are. sides: how A and B are fetched.
    """

    name: str
    tile: Tile
    tensor: str
    dtypes: tuple
    finish: tuple
    sizes: tuple
    batch: tuple
    a: tuple
    b: tuple
    indices: str
    num_sizes: int
    sides: tuple


def render(params: tuple, target) -> str:
    """Kernel (A, B, extras..., outputs...)."""
    plan = Plan(*params)
    return _Gemm(plan._replace(tile=Tile(*plan.tile)), target).text()


class _Gemm:
    def __init__(self, plan: Plan, target):
        self.plan, tile = plan, plan.tile
        self.k = k = KernelSource(plan.name, target, tile.block, plan.indices)
        self.a, self.b = k.operand(plan.dtypes[0]), k.operand(plan.dtypes[1])
        self.finish = Finish(k, *plan.finish)
        self.slots = [k.size() for _ in range(plan.num_sizes)]
        self.entries, self.rows, self.columns, self.depth, self.pieces, self.piece = map(self._value, plan.sizes)

    def _value(self, entry) -> str:
        return self.slots[entry[1]] if isinstance(entry, tuple) else self.k.i(entry)

    def _walk(self, number: str, axes: Sequence[tuple]) -> str:
        """The offset of element `number` of collapsed axes (size, stride)."""
        k, out = self.k, ""
        for at, (_, stride) in zip(k.coordinates(number, [self._value(n) for n, _ in axes]), axes):
            step = at if stride == 1 else k.mul(at, self._value(stride))
            out = k.add(out, step) if out else step
        return k.let(out or k.i(0))

    def text(self) -> str:
        k, plan, tile = self.k, self.plan, self.plan.tile
        (a_rows, a_depth), (b_depth, b_columns) = plan.a, plan.b
        product = tile_product(k, tile, self.finish.accumulate, plan.tensor, *(Side(*side) for side in plan.sides))
        product.left_panel.read(self.a)
        product.right_panel.read(self.b)
        row_tiles = k.let(k.ceil_div(self.rows, tile.rows), "row_tiles")
        column_tiles = k.let(k.ceil_div(self.columns, tile.columns), "column_tiles")
        total = k.let(k.product([self.pieces, self.entries, row_tiles, column_tiles]), "total")
        with k.block_stride(total) as number:
            piece, entry, row_tile, column_tile = k.coordinates(
                number, [self.pieces, self.entries, row_tiles, column_tiles]
            )
            first_row = k.let(k.mul(row_tile, tile.rows), "first_row")
            first_column = k.let(k.mul(column_tile, tile.columns), "first_column")
            start = k.fresh("start")
            k.line(f"{start} = {k.mul(piece, self.piece)}")
            end = k.add(start, self.piece)
            end = k.let(f"({end} if {end} < {self.depth} else {self.depth})", "end")
            chunks = k.let(f"({k.ceil_div(k.sub(end, start), tile.depth)} if {start} < {end} else {k.i(0)})", "chunks")
            at_a = self._walk(entry, [(n, strides[0]) for n, strides in plan.batch])
            at_b = self._walk(entry, [(n, strides[1]) for n, strides in plan.batch])

            def place(first: str, within: str, limit: str, axes: Sequence[tuple], base: str) -> str:
                # What lies beyond the last row is read from the first one: its sums are not stored.
                at = k.let(k.add(first, within))
                return k.let(k.add(base, self._walk(k.let(f"({at} if {at} < {limit} else {k.i(0)})"), axes)))

            left, right = product.left_panel, product.right_panel
            left_bases, right_bases = (k.local(k.index, panel.count) for panel in (left, right))
            with left.each() as (n, row, _):
                k.store(left_bases, n, place(first_row, row, self.rows, a_rows, at_a))
            with right.each() as (n, _, column):
                k.store(right_bases, n, place(first_column, column, self.columns, b_columns, at_b))

            def element(panel: Panel, n: str, depth: str, axes: Sequence[tuple], bases: Operand, operand: Operand):
                at = k.let(k.add(start, depth))
                index = lambda: k.add(k.load(bases, n), self._walk(at, axes))
                panel.fetch(n, [f"{at} < {end}"], operand, index)

            def fetch() -> None:
                with left.each() as (n, _, depth):
                    element(left, n, depth, a_depth, left_bases, self.a)
                with right.each() as (n, depth, _):
                    element(right, n, depth, b_depth, right_bases, self.b)
                k.line(f"{start} = {k.add(start, tile.depth)}")

            product.run(chunks, fetch)
            above = k.let(k.add(k.mul(k.mul(piece, self.entries), self.rows), k.mul(entry, self.rows)), "above")

            def visit(row: str, column: str, value: str) -> None:
                row, column = k.let(k.add(first_row, row), "row"), k.let(k.add(first_column, column), "column")
                with k.suite(f"if {row} < {self.rows} and {column} < {self.columns}:"):
                    self.finish.store(value, k.let(k.add(above, row), "pixel"), column, self.columns)

            product.results(visit)
        return k.text()
