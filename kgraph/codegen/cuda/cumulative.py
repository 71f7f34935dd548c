"""Running sums, products, extrema and log-sum-exps along one axis.

A block scans `units` rows side by side with `lanes` threads for each, as reduce.py reduces them, tile by tile: a lane
scans a few neighbouring elements, the lanes' totals are scanned within warps, then in shared memory, and the last is
carried to the next tile. Few long rows are cut into chunks: a first kernel finds the chunks' totals, a second one scans
these, and a third one scans the chunks, each from what those before it have together. So the order of combination is
that of sizes and target alone.
"""

from __future__ import annotations

from kgraph.codegen.cuda import scalar_ops
from kgraph.codegen.cuda.reduce import WAVES, BlockShape
from kgraph.codegen.cuda.shuffles import Shuffles
from kgraph.codegen.cuda.source import KernelSource, Operand, index_type
from kgraph.codegen.expressions import DTYPES, EXPENSIVE, compute_dtype
from kgraph.codegen.kernel import KernelCall, KernelSpec, Launch, Temporary
from kgraph.codegen.reductions import Walk
from kgraph.codegen.scans import COMBINE, neutral
from kgraph.ir import Dim, Node, TensorType
from kgraph.ir.dims import ceil_div, product

TEMPLATE = "kgraph.codegen.cuda.cumulative:render"
ITEMS = 4  # neighbouring elements that a lane scans alone
CHUNK_TILES = 4  # tiles of a chunk at least
MANY_UNITS = 4  # rows per thread that the device runs from which on a thread scans a row alone


def accepts(node: Node) -> str | None:
    """None where `lower` takes the node, else why not."""
    if node.name not in COMBINE:
        return f"{node.name} is no cumulative reduction"
    if node.output.dtype not in DTYPES or node.output.dtype == "bool":
        return f"no cumulative kernel for {node.output.dtype}"
    return None


def lower(node: Node, target) -> list[KernelCall]:
    """One kernel call, or three for few long rows."""
    x, axis, combine = node.inputs[0], node.attrs["axis"], COMBINE[node.name]
    sizes = [product(x.shape[:axis]), x.shape[axis], product(x.shape[axis + 1 :])]
    reverse = bool(node.attrs["reverse"])
    outer, n, inner = sizes
    units, shape = outer * inner, _shape(sizes, target)
    chunk = _chunk(units, n, shape, target)
    if not chunk:
        return [_call(node.name, combine, reverse, "whole", shape, sizes, [x, node.output], 0)]
    chunks = ceil_div(n, chunk)
    totals, before = (Temporary(TensorType((chunks, units), compute_dtype(x.dtype))) for _ in range(2))
    between = [1, chunks, units]
    parts = _shape(between, target), between, [totals, before], 0
    return [
        _call(f"{node.name}_totals", combine, reverse, "totals", shape, sizes, [x, totals], chunk),
        _call(f"{node.name}_between", combine, False, "whole", *parts),
        _call(node.name, combine, reverse, "chunks", shape, sizes, [x, before, node.output], chunk),
    ]


def _shape(sizes: list, target) -> BlockShape:
    outer, n, inner = sizes
    if isinstance(inner, int) and inner == 1:
        return BlockShape.choose(Walk([outer, n], ("k", "r"), [], []), target)
    units = outer * inner
    if isinstance(units, int) and units >= MANY_UNITS * target.num_sms * target.block:
        return BlockShape(False, target.block, 1)
    return BlockShape.choose(Walk([outer, n, inner], ("k", "r", "k"), [], []), target)


def _chunk(units: int | Dim, n: int | Dim, shape: BlockShape, target) -> int:
    """Elements of a row that one block scans, or 0 for all."""
    if not isinstance(units, int) or units == 0:
        return 0
    tile, blocks, wanted = shape.lanes * ITEMS, -(-units // shape.units), WAVES * target.num_sms
    least = CHUNK_TILES * tile
    if 2 * blocks > wanted or (isinstance(n, int) and n <= 2 * least):
        return 0
    if not isinstance(n, int):
        return 4 * least
    return max(least, -(-(n * blocks) // wanted // tile) * tile)


def _call(
    name: str, combine: str, reverse: bool, mode: str, shape: BlockShape, sizes: list, operands: list, chunk: int
) -> KernelCall:
    """mode: "whole" scans rows, "totals" gives the total of each chunk, "chunks" scans them given the totals."""
    outer, n, inner = sizes
    total = product(sizes)
    dtypes = tuple(o.type.dtype for o in operands)
    groups = ceil_div(outer * inner, shape.units)
    return KernelCall(
        spec=KernelSpec(name, TEMPLATE, (name, combine, reverse, mode, shape, dtypes, index_type([total]))),
        operands=operands,
        outputs=1,
        sizes=[*sizes, chunk] if chunk else list(sizes),
        extent=groups * ceil_div(n, chunk) if chunk else groups,
        flops=total * EXPENSIVE.get(combine, 1) * 2,
        bytes=sum((o.type.nbytes for o in operands), 0),
        launch=Launch(shape.units * shape.lanes),
    )


def render(params: tuple, target) -> str:
    """x[outer, n, inner] -> the same shape, or the totals of its chunks, [chunks, outer * inner]."""
    name, combine, reverse, mode, shape, dtypes, index = params
    k = KernelSource(name, target, shape.units * shape.lanes, index)
    x = k.operand(dtypes[0])
    carried = k.operand(dtypes[1]) if mode == "chunks" else None
    out = k.operand(dtypes[-1])
    outer, n, inner = (k.size() for _ in range(3))
    chunk = k.size() if mode != "whole" else None
    scan = _Scan(k, combine, dtypes[0], shape)
    units = k.let(k.mul(outer, inner), "units")
    groups = k.let(k.ceil_div(units, shape.units), "groups")
    total = k.let(k.mul(groups, k.ceil_div(n, chunk)), "total") if chunk else groups
    with k.block_stride(total) as number:
        first = k.mod(number, groups) if chunk else number
        unit = k.let(k.add(k.mul(first, shape.units), scan.slot), "unit")
        # Lanes without a row go along with the last one and write nothing.
        valid = f"{unit} < {units}"
        row = k.let(f"({unit} if {valid} else {k.sub(units, 1)})", "row")
        base = k.let(k.add(k.mul(k.mul(k.div(row, inner), n), inner), k.mod(row, inner)), "base")
        start, stop, part = k.i(0), n, ""
        if chunk:
            part = k.let(k.div(number, groups), "part")
            start = k.let(k.mul(part, chunk), "begin")
            end = k.add(start, chunk)
            stop = k.let(f"({end} if {end} < {n} else {n})", "stop")
        scan.start()
        if carried:
            with k.suite(f"if {part} > {k.i(0)}:"):
                k.line(f"{scan.carry} = {k.load(carried, k.add(k.mul(k.sub(part, 1), units), row))}")

        def place(position: str) -> str:
            along = k.sub(k.sub(n, 1), position) if reverse else position
            return k.let(k.add(base, k.mul(along, inner)))

        with k.range(start, stop, shape.lanes * ITEMS) as tile:
            scan.tile(tile, stop, x, place, "" if mode == "totals" else valid, out)
        if mode == "totals":
            with k.suite(f"if {scan.lane} == {k.i(0)} and {valid}:"):
                k.store(out, k.add(k.mul(part, units), row), scan.carry)
    return k.text()


class _Scan:
    """The lanes of a row: slot and lane number, and what is carried from tile to tile."""

    def __init__(self, k: KernelSource, combine: str, dtype: str, shape: BlockShape):
        self.k, self.combine, self.dtype, self.lanes = k, combine, compute_dtype(dtype), shape.lanes
        self.neutral = k.literal(neutral(combine, self.dtype), self.dtype)
        self.stride = 1 if shape.inner else shape.units
        self.thread = k.thread()
        across, along = (k.div, k.mod) if shape.inner else (k.mod, k.div)
        width = shape.lanes if shape.inner else shape.units
        self.slot, self.lane = k.let(across(self.thread, width), "slot"), k.let(along(self.thread, width), "lane")
        self.within = max(min(shape.lanes, k.target.group // self.stride), 1)  # lanes of a row in a warp
        self.pieces = shape.lanes // self.within
        self.array: Operand | None = k.shared(self.dtype, k.block // self.within) if self.pieces > 1 else None
        self.shuffles = Shuffles(k, self.thread) if self.within > 1 else None
        self.carry = k.fresh("carry")

    def start(self) -> None:
        self.k.line(f"{self.carry} = {self.neutral}")

    def fold(self, earlier: str, later: str) -> str:
        return self.k.let(scalar_ops.form(self.k, self.combine, [earlier, later], [self.dtype] * 2, self.dtype))

    def tile(self, tile: str, stop: str, x: Operand, place, valid: str, out: Operand) -> None:
        """Scans the elements from `tile` on, below `stop`, and stores them where `valid`; nowhere if that is "".
        place(position): where an element lies."""
        k = self.k
        first = k.let(k.add(tile, k.mul(self.lane, ITEMS)))
        values, places, conditions = [], [], []
        for item in range(ITEMS):
            position = k.let(k.add(first, item)) if item else first
            inside = k.let(f"({position} < {stop})", "inside")
            # What is read in the place of an element beyond the end is not used.
            places.append(place(k.let(f"({position} if {inside} else {k.i(0)})")))
            conditions.append(inside)
        for at, inside in zip(places, conditions):
            values.append(k.let(f"({k.load(x, at)} if {inside} else {self.neutral})"))
        for item in range(1, ITEMS):
            values[item] = self.fold(values[item - 1], values[item])
        before, total = self._across(values[-1])
        if valid:
            prefix = self.fold(self.carry, before) if before else self.carry
            for at, inside, value in zip(places, conditions, values):
                with k.suite(f"if {inside} and {valid}:"):
                    k.store(out, at, self.fold(prefix, value))
        k.line(f"{self.carry} = {self.fold(self.carry, total)}")

    def _across(self, value: str) -> tuple[str, str]:
        """What the lanes before this one have together ("" for nothing), and what all of them have."""
        before, total = self._within_warp(value)
        if self.array is None:
            return before, total
        # What each warp has of the row lies in shared memory, in the order of its lanes.
        k, array, stride = self.k, self.array, self.stride
        own = k.let(k.div(self.lane, self.within), "piece")
        first = k.mul(k.div(self.thread, self.lanes * stride), self.pieces * stride)
        first = k.let(k.add(first, k.mod(self.thread, stride)) if stride > 1 else first, "first")
        with k.suite(f"if {k.mod(self.lane, self.within)} == {k.i(0)}:"):
            k.store(array, k.add(first, k.mul(own, stride)), total)
        k.synchronise()
        all_before, whole = k.fresh("before"), k.fresh("whole")
        k.line(f"{all_before} = {self.neutral}")
        k.line(f"{whole} = {self.neutral}")
        with k.range(0, k.i(self.pieces), 1) as number:
            piece = k.load(array, k.add(first, k.mul(number, stride)))
            k.line(f"{all_before} = ({whole} if {number} == {own} else {all_before})")
            k.line(f"{whole} = {self.fold(whole, piece)}")
        k.synchronise()  # before the next tile takes the array
        return self.fold(all_before, before) if before else all_before, whole

    def _within_warp(self, value: str) -> tuple[str, str]:
        """The same of the lanes in the thread's warp alone."""
        k, shuffles = self.k, self.shuffles
        if shuffles is None:
            return "", value
        place = k.let(k.mod(self.lane, self.within), "place")
        through, step = k.fresh("through"), k.fresh("step")
        k.line(f"{through} = {value}")
        k.line(f"{step} = {k.i(1)}")
        with k.suite(f"while {step} < {k.i(self.within)}:"):
            other = shuffles.up(through, self.dtype, k.let(k.mul(step, self.stride)))
            other = k.let(f"({other} if {place} >= {step} else {self.neutral})")
            k.line(f"{through} = {self.fold(other, through)}")
            k.line(f"{step} = {k.mul(step, 2)}")
        before = shuffles.up(through, self.dtype, k.i(self.stride))
        before = k.let(f"({before} if {place} > {k.i(0)} else {self.neutral})", "before")
        last = k.sub(k.add(shuffles.place, (self.within - 1) * self.stride), k.mul(place, self.stride))
        return before, shuffles.of(through, self.dtype, k.let(last))
