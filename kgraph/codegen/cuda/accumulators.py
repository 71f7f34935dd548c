"""What the threads of a block accumulate, each in variables of its own, and how these are merged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kgraph.codegen.cuda import scalar_ops
from kgraph.codegen.cuda.shuffles import Shuffles
from kgraph.codegen.cuda.source import KernelSource, Operand
from kgraph.codegen.expressions import compute_dtype
from kgraph.codegen.reductions import POSITIONS, neutral

MOMENTS = ("moments", "chunk_moments", "merge_moments")
GROUP = 4  # elements that a thread loads before it accumulates them


def strips(k: KernelSource, start: str, stop: str, stride: int, group: int = GROUP) -> Iterator[list[str]]:
    """Two loops over start, start + stride ... below stop, `group` at a time and one at a time: gives the numbers that
    the body of each has to treat."""
    i = k.fresh("i")
    k.line(f"{i} = {k.i(start)}")
    for count in (group, 1) if group > 1 else (1,):
        last = k.add(i, (count - 1) * stride) if count > 1 else i
        with k.suite(f"while {last} < {stop}:"):
            yield [i] + [k.let(k.add(i, number * stride)) for number in range(1, count)]
            k.line(f"{i} = {k.add(i, count * stride)}")


class Lanes:
    """Merges what the lanes of each result have: `stride` threads lie between two lanes.

    The lanes of a result that are in one warp exchange values; what several warps have goes through shared memory. The
    order of merging is that of these numbers alone.
    """

    def __init__(self, k: KernelSource, sums: Sequence[Accumulator], lanes: int, stride: int):
        self.k, self.sums, self.lanes, self.stride = k, sums, lanes, stride
        self.within = max(min(lanes, k.target.group // stride), 1)  # lanes of a result in a warp
        self.pieces = lanes // self.within
        self.arrays: list[list[Operand]] = []
        if self.pieces > 1:
            self.arrays = [[k.shared(dtype, k.block // self.within) for dtype in s.dtypes] for s in sums]

    def merge(self, thread: str, lane: str, spread: bool = False) -> None:
        """Leaves the results in lane 0, or in all lanes. All threads of the block come here, and meet again before they
        come here once more: `synchronise`."""
        if self.lanes == 1:
            return
        k, within, stride = self.k, self.within, self.stride
        shuffles = Shuffles(k, thread) if within > 1 else None
        self._merge_neighbours(shuffles, within)
        if self.pieces > 1:
            first = k.mul(k.div(thread, self.lanes * stride), self.pieces * stride)
            first = k.let(k.add(first, k.mod(thread, stride)) if stride > 1 else first, "first")
            with k.suite(f"if {k.mod(lane, within)} == {k.i(0)}:"):
                place = k.let(k.add(first, k.mul(k.div(lane, within), stride)))
                for array, name in self._variables():
                    k.store(array, place, name)
            k.synchronise()
            if self.pieces > within:  # too many for the lanes in a warp to take one each
                if spread:
                    self._merge_pieces(first)
                else:
                    with k.suite(f"if {lane} == {k.i(0)}:"):
                        self._merge_pieces(first)
                return
            self._fetch(k.let(k.add(first, k.mul(k.mod(lane, self.pieces), stride))))
            self._merge_neighbours(shuffles, self.pieces)
        if spread and shuffles is not None:
            place = k.let(k.sub(shuffles.place, k.mul(k.mod(lane, within), stride)), "first")
            for s in self.sums:
                for name, dtype in zip(s.names, s.dtypes):
                    k.line(f"{name} = {shuffles.of(name, dtype, place)}")

    def synchronise(self) -> None:
        """Between two merges: before other values take the places in shared memory."""
        if self.arrays:
            self.k.synchronise()

    def _merge_pieces(self, first: str) -> None:
        k = self.k
        self._fetch(first)
        with k.range(1, k.i(self.pieces), 1) as number:
            place = k.let(k.add(first, k.mul(number, self.stride)))
            for arrays, s in zip(self.arrays, self.sums):
                s.merge([k.load(array, place) for array in arrays])

    def _variables(self) -> Iterator[tuple[Operand, str]]:
        """Array and name of every variable."""
        for arrays, s in zip(self.arrays, self.sums):
            yield from zip(arrays, s.names)

    def _fetch(self, place: str) -> None:
        for array, name in self._variables():
            self.k.line(f"{name} = {self.k.load(array, place)}")

    def _merge_neighbours(self, shuffles: Shuffles | None, count: int) -> None:
        """Merges `count` lanes of a result that follow each other in a warp; leaves it in the first one."""
        if shuffles is None or count == 1:
            return
        k, distance = self.k, self.k.fresh("distance")
        k.line(f"{distance} = {k.i(count // 2 * self.stride)}")
        with k.suite(f"while {distance} >= {k.i(self.stride)}:"):
            for s in self.sums:
                s.merge([shuffles.down(name, dtype, distance) for name, dtype in zip(s.names, s.dtypes)])
            k.line(f"{distance} = {k.div(distance, 2)}")


class Accumulator:
    """A reduction's value in one thread.

    names: its variables, of `dtypes` (compute form). inputs: how many values come in at each step.
    """

    inputs = 1

    def __init__(self, k: KernelSource, kind: str, dtype: str):
        self.k, self.kind, self.dtype = k, kind, compute_dtype(dtype)
        self.dtypes = [self.dtype]
        self.names = [k.fresh("sum")]

    def reset(self) -> None:
        self.k.line(f"{self.names[0]} = {self.k.literal(neutral(self.kind, self.dtype), self.dtype)}")

    def step(self, values: Sequence[str], position: str) -> None:
        """Take in one more element, which stands at `position` of the reduced axes."""
        self.merge(values)

    def group(self, elements: Sequence[Sequence[str]], positions: Sequence[str]) -> None:
        """Take in several elements."""
        for values, position in zip(elements, positions, strict=True):
            self.step(values, position)

    def finish(self) -> None:
        """No more values come in this thread."""

    def merge(self, others: Sequence[str]) -> None:
        """Take in another thread's variables."""
        name = {"sum": "add", "prod": "mul", "max": "maximum", "min": "minimum"}.get(self.kind, f"bitwise_{self.kind}")
        (mine,) = self.names
        self.k.line(f"{mine} = {scalar_ops.form(self.k, name, [mine, others[0]], [self.dtype] * 2, self.dtype)}")

    def results(self, dtype: str) -> list[str]:
        """The result as a value of `dtype`; some reductions have more than one."""
        return self.names[:1]


class CompensatedSum(Accumulator):
    """A float sum that keeps the rounding errors of its steps."""

    def __init__(self, k: KernelSource, kind: str, dtype: str):
        super().__init__(k, kind, dtype)
        self.lost = k.fresh("lost")

    def reset(self) -> None:
        super().reset()
        self.k.line(f"{self.lost} = {self.k.literal(0, self.dtype)}")

    def step(self, values: Sequence[str], position: str) -> None:
        k, (total,), (value,) = self.k, self.names, values
        after = k.let(f"({total} + {value})")
        rounded = k.let(f"({after} - {total})")
        k.line(f"{self.lost} = {self.lost} + (({total} - ({after} - {rounded})) + ({value} - {rounded}))")
        k.line(f"{total} = {after}")

    def finish(self) -> None:
        # After an overflow or an infinite operand the error is NaN while the sum itself is right.
        (total,) = self.names
        self.k.line(f"{total} = ({total} + {self.lost} if {self.lost} == {self.lost} else {total})")


class Position(Accumulator):
    """argmax and argmin: the extremum and its first position; the first NaN wins over everything."""

    def __init__(self, k: KernelSource, kind: str, dtype: str):
        super().__init__(k, kind, dtype)
        self.dtypes = [self.dtype, k.index]
        self.names = [*self.names, k.fresh("at")]

    def reset(self) -> None:
        super().reset()
        self.k.line(f"{self.names[1]} = {self.k.i((1 << 31) - 1 if self.k.index == 'uint32' else (1 << 63) - 1)}")

    def step(self, values: Sequence[str], position: str) -> None:
        self.merge([*values, position])

    def _beats(self, x: str, y: str) -> str:
        """Whether x comes before y, whatever their positions."""
        beats = f"{x} {'>' if self.kind == 'argmax' else '<'} {y}"
        return f"({beats} or ({x} != {x} and {y} == {y}))" if scalar_ops.is_float(self.dtype) else f"({beats})"

    def merge(self, others: Sequence[str]) -> None:
        (best, at), (value, position) = self.names, others
        tie = f"(not {self._beats(best, value)} and {position} < {at})"
        with self.k.suite(f"if {self._beats(value, best)} or {tie}:"):
            self.k.line(f"{best} = {value}")
            self.k.line(f"{at} = {position}")

    def results(self, dtype: str) -> list[str]:
        return [self.k.let(scalar_ops.convert(self.k, f"int64({self.names[1]})", "int64", dtype))]


class Moments(Accumulator):
    """Count, mean (and what rounding took from it), and sum of squared differences from the mean: sets of elements are
    combined so that nothing cancels (Chan, Golub and LeVeque, 1979).

    "moments" gives the mean and the variance, "chunk_moments" the four numbers, of which "merge_moments" takes in some.
    """

    def __init__(self, k: KernelSource, kind: str, dtype: str):
        super().__init__(k, kind, dtype)
        self.names = [k.fresh(name) for name in ("count", "mean", "lost", "squares")]
        self.dtypes = [self.dtype] * 4
        self.inputs = 4 if kind == "merge_moments" else 1

    def _c(self, value: float) -> str:
        return self.k.literal(value, self.dtype)

    def reset(self) -> None:
        for name in self.names:
            self.k.line(f"{name} = {self._c(0)}")

    def step(self, values: Sequence[str], position: str) -> None:
        self.group([values], [position])

    def group(self, elements: Sequence[Sequence[str]], positions: Sequence[str]) -> None:
        if self.inputs == 4:
            for numbers in elements:
                self.merge(numbers)
            return
        k, values, number = self.k, [value for (value,) in elements], len(elements)
        if number == 1:
            (mean,), lost = values, self._c(0)
            apart = k.let(f"({mean} - {mean})")  # NaN for what is infinite
            squares = k.let(f"({apart} * {apart})")
        else:
            mean = k.let(f"(({' + '.join(values)}) * {self._c(1 / number)})")
            differences = [k.let(f"({value} - {mean})") for value in values]
            rest = k.let(f"(({' + '.join(differences)}) * {self._c(1 / number)})")
            total = " + ".join(f"{d} * {d}" for d in differences)
            squares = k.let(f"({total} - {rest} * {rest} * {self._c(number)})")
            lost = k.let(f"({rest} if {rest} == {rest} else {self._c(0)})")
        self.merge([self._c(number), mean, lost, squares])

    def merge(self, others: Sequence[str]) -> None:
        k, (count, mean, lost, squares) = self.k, self.names
        more, other, other_lost, other_squares = others
        with k.suite(f"if {count} == {self._c(0)}:"):
            for name, value in zip(self.names, others):
                k.line(f"{name} = {value}")
        with k.suite(f"elif {more} > {self._c(0)}:"):
            after = k.let(f"({count} + {more})")
            share = k.let(f"({more} / {after})")
            apart = k.let(f"(({other} - {mean}) + ({other_lost} - {lost}))")
            k.line(f"{squares} = {squares} + ({other_squares} + {apart} * {apart} * ({count} * {share}))")
            change = k.let(f"({apart} * {share} + {lost})")
            moved = k.let(f"({mean} + {change})")
            rounded = k.let(f"({moved} - {mean})")
            error = k.let(f"(({mean} - ({moved} - {rounded})) + ({change} - {rounded}))")
            # Differences between infinite means are no numbers.
            finite = k.let(f"(fabs{scalar_ops.suffix(self.dtype)}({apart}) < {self._c(float('inf'))})")
            k.line(f"{mean} = ({moved} if {finite} else {mean} + {other})")
            k.line(f"{lost} = ({error} if {finite} else {self._c(0)})")
            k.line(f"{count} = {after}")

    def results(self, dtype: str) -> list[str]:
        if self.kind == "chunk_moments":
            return self.names
        count, mean, lost, squares = self.names
        centre = f"(({mean} + {lost}) if {count} > {self._c(0)} else {self._c(float('nan'))})"
        return [self.k.let(centre), self.k.let(f"({squares} / {count})")]


def accumulator(k: KernelSource, kind: str, dtype: str, compensated: bool) -> Accumulator:
    """The accumulator of a reduction of `dtype` values."""
    if kind in POSITIONS:
        return Position(k, kind, dtype)
    if kind in MOMENTS:
        return Moments(k, kind, dtype)
    if kind == "sum" and compensated and scalar_ops.is_float(dtype):
        return CompensatedSum(k, kind, dtype)
    return Accumulator(k, kind, dtype)
