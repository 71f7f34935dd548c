"""Kernels that look at a row several times: softmax and the normalisations.

A row is everything that one statistic covers. As in reduce.py a block takes `units` rows side by side with `lanes`
threads for each, so that neighbouring threads read neighbouring addresses whether the innermost merged axis is reduced
or kept. Rows of known length up to `MOST_KEPT` elements a thread are read once, go through the elementwise prologue and
stay in registers; longer ones are read again for each look at them, from a cache in general. Statistics are merged and
go back to all lanes of the row. Results are written once, through the elementwise epilogue.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kgraph.codegen import expressions, regions
from kgraph.codegen.cuda.accumulators import Accumulator, Lanes, strips
from kgraph.codegen.cuda.loop import leaf_value
from kgraph.codegen.cuda.reduce import SHORT_ROW, BlockShape
from kgraph.codegen.cuda.source import KernelSource, Operand, index_type
from kgraph.codegen.kernel import KernelCall, KernelSpec, Launch
from kgraph.codegen.normalisations import EXPONENTIAL
from kgraph.codegen.reductions import Walk, walk
from kgraph.codegen.rows import Parts, row_dtype
from kgraph.ir.dims import ceil_div, product

FEW_KEPT = 8  # elements of a row that a thread keeps, if threads suffice
MOST_KEPT = 16
HEAVY_KEPT = 4  # where the code around an element is long
HEAVY = 64  # operations per element from which on it is
WIDEST = 4  # blocks of elementwise kernels that make up the widest block


@dataclass(frozen=True)
class RowShape:
    """How a block takes rows. block: see `BlockShape`. kept: elements that each lane keeps in registers, 0 for none."""

    block: BlockShape
    kept: int

    @property
    def threads(self) -> int:
        return self.block.units * self.block.lanes

    @staticmethod
    def choose(over: Walk, work: int, target) -> RowShape:
        """work: operations per element around the row."""
        length, units = product(over.reduced_sizes), product(over.kept_sizes)
        if not isinstance(length, int):
            return RowShape(BlockShape.choose(over, target), 0)
        most = HEAVY_KEPT if work > HEAVY else MOST_KEPT
        whole = _power_of_two(length)
        if over.roles[-1] == "r":
            lanes = 1 if length <= min(SHORT_ROW, most) else _power_of_two(-(-length // min(FEW_KEPT, most)))
            lanes = min(max(lanes, min(target.group, whole if lanes > 1 else 1)), target.block * WIDEST)
            if isinstance(units, int) and units * lanes < target.num_sms * target.block and lanes > 1:
                lanes = max(lanes, min(target.block, whole))
            shape = BlockShape(True, max(1, target.block // lanes), lanes)
        else:
            shape = BlockShape.choose(over, target)
        kept = -(-length // shape.lanes)
        return RowShape(shape, kept if 0 < kept <= most else 0)


def _power_of_two(n: int) -> int:
    """The least one that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def lower_parts(parts: Parts, template: str, algorithm: tuple, target, prefix: str) -> list[KernelCall]:
    """One kernel call; `algorithm` is what the renderer has to know about the core."""
    over = walk(parts)
    work = expressions.flops(parts.prologue) + expressions.flops(parts.epilogue)
    shape = RowShape.choose(over, work, target)
    describe = lambda xs: tuple((x.dtype, x.spans, x.is_coordinate) for x in xs)
    name = regions.kernel_name(expressions.name(parts.prologue), prefix, parts.label)
    lengths = tuple(s for s in over.reduced_sizes) if shape.kept else ()
    layout = (over.roles, shape, lengths, parts.reduced, index_type([product(over.sizes)]))
    operands = [x.value for x in (*over.leaves, *over.extras) if x.value is not None] + list(parts.outputs)
    inplace = regions.inplace_pairs([*over.leaves, *over.extras], parts.outputs, len(operands) - len(parts.outputs))
    return [
        KernelCall(
            spec=KernelSpec(
                name,
                template,
                (name, parts.prologue, describe(over.leaves), describe(over.extras), parts.epilogue, layout, algorithm),
            ),
            operands=operands,
            outputs=len(parts.outputs),
            sizes=list(over.sizes),
            extent=ceil_div(product(over.kept_sizes), shape.block.units),
            flops=product(parts.shape) * (work + (24 if prefix in EXPONENTIAL else 6)),
            bytes=regions.total_bytes(operands),
            # An element is written by the thread that reads it last, after all that the row's other lanes need of it.
            notes={"inplace": () if parts.reduced else inplace},
            launch=Launch(shape.threads),
        )
    ]


@dataclass
class Spot:
    """Where a piece of code stands in a row.

    slot: which of the kept elements it is; position: along the reduced axes; inside: the condition that it belongs to
    the row at all, or "" where there is no doubt.
    """

    slot: int
    position: str
    inside: str


class RowKernel:
    """The frame of a row kernel: `for_each_row(algorithm)`, whose argument gets this object with a row set up.

    dtype: the row's, in compute form. kept: elements of the row that each lane holds in registers; 0 for none.
    further: operands of these dtypes behind those that the epilogue writes.
    """

    def __init__(self, params: tuple, target, further: Sequence[str] = ()):
        name, self.prologue, self.leaves, self.extras, self.epilogue, layout, self.algorithm = params
        self.roles, shape, self.lengths, self.is_reduced, index = layout
        self.shape, self.kept = shape.block, shape.kept
        self.k = k = KernelSource(name, target, shape.threads, index)
        described = (*self.leaves, *self.extras)
        self.pointers = [None if is_coordinate else k.operand(dtype) for dtype, _, is_coordinate in described]
        self.outputs = [k.operand(dtype) for dtype in expressions.output_dtypes(self.epilogue)]
        self.further = [k.operand(dtype) for dtype in further]
        self.sizes = [k.size() for _ in self.roles]
        self.dtype = row_dtype(self.prologue)
        self.kept_axes = [a for a, role in enumerate(self.roles) if role == "k"]
        self.reduced_axes = [a for a, role in enumerate(self.roles) if role == "r"]
        if self.lengths:  # known: divisions by them are cheaper
            for axis, length in zip(self.reduced_axes, self.lengths):
                self.sizes[axis] = k.i(length)
        self.units = k.let(k.product([self.sizes[a] for a in self.kept_axes]), "units")
        self.length = k.i(product(self.lengths)) if self.lengths else ""
        self.length = self.length or k.let(k.product([self.sizes[a] for a in self.reduced_axes]), "length")
        self.spots: list[Spot] = []
        self.values: list[str] = []

    def for_each_row(self, algorithm: Callable[[RowKernel], None]) -> str:
        """Writes `algorithm(self)` for a row and gives the kernel's text."""
        k, shape = self.k, self.shape
        groups = k.let(k.ceil_div(self.units, shape.units), "groups")
        self.thread = thread = k.thread()
        across, along = (k.div, k.mod) if shape.inner else (k.mod, k.div)
        width = shape.lanes if shape.inner else shape.units
        slot, self.lane = k.let(across(thread, width), "slot"), k.let(along(thread, width), "lane")
        with k.block_stride(groups) as number:
            unit = k.let(k.add(k.mul(number, shape.units), slot), "unit")
            # Lanes without a row go along with the last one and write nothing.
            self.valid = f"{unit} < {self.units}"
            self.unit = k.let(f"({unit} if {self.valid} else {k.sub(self.units, 1)})", "row")
            self.coordinates = [""] * len(self.roles)
            for a, at in zip(self.kept_axes, k.coordinates(self.unit, [self.sizes[a] for a in self.kept_axes])):
                self.coordinates[a] = at
            algorithm(self)
        return k.text()

    # -- looks at the row ---------------------------------------------------------------------------------------------
    def read(self) -> None:
        """Fills the registers, where the row stays in them."""
        k, lanes, length = self.k, self.shape.lanes, product(self.lengths)
        self.spots, self.values = [], []
        for slot in range(self.kept):
            position = k.let(k.add(self.lane, slot * lanes)) if slot else self.lane
            self.spots.append(
                Spot(slot, position, f"{position} < {self.length}" if (slot + 1) * lanes > length else "")
            )
        for spot in self.spots:
            self.values.append(k.let(self._load(spot)))

    def each(self, visit: Callable[[str, Spot], str | None]) -> None:
        """Code of `visit(value, spot)` for each element of the lane; a text that it gives takes the element's place,
        as long as the row stays in registers."""
        k = self.k
        if self.kept:
            for spot in self.spots:
                value = visit(self.values[spot.slot], spot)
                if value is not None:
                    self.values[spot.slot] = k.let(value)
            return
        for positions in strips(k, self.lane, self.length, self.shape.lanes):
            spots = [Spot(0, position, "") for position in positions]
            for value, spot in zip([k.let(self._load(spot)) for spot in spots], spots):
                visit(value, spot)

    def accumulate(
        self, sums: Sequence[Accumulator], term: Callable[[str], str] = lambda value: value, neutral: float = 0
    ) -> None:
        """Takes `term(value)` of every element of the row into each of `sums`, none of which `neutral` changes, and
        leaves the results in every lane of it."""
        k = self.k
        for s in sums:
            s.reset()
        if self.kept:
            for spot, value in zip(self.spots, self.values):
                for s in sums:
                    s.step([self.masked(k.let(term(value)), spot, neutral)], spot.position)
        else:
            for positions in strips(k, self.lane, self.length, self.shape.lanes):
                terms = [[k.let(term(k.let(self._load(Spot(0, position, "")))))] for position in positions]
                for s in sums:
                    s.group(terms, positions)
        for s in sums:
            s.finish()
        self.merge(sums)

    def masked(self, value: str, spot: Spot, neutral: float) -> str:
        """The value, or what changes no statistic outside of the row."""
        return self.k.let(f"({value} if {spot.inside} else {self.c(neutral)})") if spot.inside else value

    def merge(self, sums: Sequence[Accumulator]) -> None:
        """Leaves in every lane of a row what the lanes have together."""
        lanes = Lanes(self.k, sums, self.shape.lanes, 1 if self.shape.inner else self.shape.units)
        lanes.merge(self.thread, self.lane, spread=True)
        lanes.synchronise()

    def write(self, visit: Callable[[str, Spot], str | list[str]]) -> None:
        """The last look: `visit(value, spot)` gives the core's result, or a list of results, which go through the
        epilogue."""
        k = self.k

        def store(value: str, spot: Spot) -> None:
            with k.suite(f"if {self.valid} and {spot.inside}:" if spot.inside else f"if {self.valid}:"):
                coordinates, whole = self._place(spot)
                results = visit(value, spot)
                values = [k.let(x) for x in (results if isinstance(results, list) else [results])]
                for pointer, (dtype, spans, _) in zip(self.pointers[len(self.leaves) :], self.extras):
                    values.append(leaf_value(k, pointer, dtype, spans, whole, coordinates, self.sizes))
                for output, result in zip(self.outputs, k.emit(self.epilogue, values)):
                    k.store(output, whole, result)

        self.each(store)

    def write_statistic(self, value: str, to: Operand | None = None) -> None:
        """Stores one value per row to an operand, by default the first output."""
        k = self.k
        with k.suite(f"if {self.lane} == {k.i(0)} and {self.valid}:"):
            k.store(to or self.outputs[0], self.unit, value)

    # -- values -------------------------------------------------------------------------------------------------------
    def c(self, value: float) -> str:
        """A constant of the row's dtype."""
        return self.k.literal(value, self.dtype)

    def row_length(self) -> str:
        """Elements of a row, in the row's dtype."""
        return self.c(product(self.lengths)) if self.lengths else f"{self.dtype}({self.length})"

    def _load(self, spot: Spot) -> str:
        k = self.k
        if spot.inside:  # what is read in the row's place is not used
            position = k.let(f"({spot.position} if {spot.inside} else {k.i(0)})")
            spot = Spot(spot.slot, position, "")
        coordinates, whole = self._place(spot)
        values = [
            leaf_value(k, pointer, dtype, spans, whole, coordinates, self.sizes)
            for pointer, (dtype, spans, _) in zip(self.pointers, self.leaves)
        ]
        return k.emit(self.prologue, values)[0]

    def _place(self, spot: Spot) -> tuple[list[str], str]:
        """The coordinates of an element, and its index in dense operands."""
        k, at = self.k, list(self.coordinates)
        for a, along in zip(
            self.reduced_axes, k.coordinates(spot.position, [self.sizes[a] for a in self.reduced_axes])
        ):
            at[a] = along
        return at, k.let(k.offset(at, self.sizes, [True] * len(self.sizes)))
