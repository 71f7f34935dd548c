"""What the threads of a block accumulate, each in variables of its own, and how these are merged in shared memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kgraph.codegen.cuda import scalar_ops
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
    """Merges what the lanes of each result have: `stride` threads lie between two lanes."""

    def __init__(self, k: KernelSource, sums: Sequence[Accumulator], lanes: int, stride: int):
        self.k, self.sums, self.lanes, self.stride = k, sums, lanes, stride
        self.arrays: list[list[Operand]] = []
        if lanes > 1:
            self.arrays = [[k.shared(dtype, k.block) for dtype in s.dtypes] for s in sums]

    def merge(self, thread: str, lane: str) -> None:
        """Leaves the results in lane 0. All threads of the block come here."""
        k = self.k
        if self.lanes == 1:
            return
        for arrays, s in zip(self.arrays, self.sums):
            for array, name in zip(arrays, s.names):
                k.store(array, thread, name)
        k.synchronise()
        half = k.fresh("half")
        k.line(f"{half} = {k.i(self.lanes // 2)}")
        with k.suite(f"while {half} > {k.i(0)}:"):
            with k.suite(f"if {lane} < {half}:"):
                other = k.let(k.add(thread, k.mul(half, self.stride) if self.stride > 1 else half))
                for arrays, s in zip(self.arrays, self.sums):
                    s.merge([k.load(array, other) for array in arrays])
                    for array, name in zip(arrays, s.names):
                        k.store(array, thread, name)
            k.synchronise()
            k.line(f"{half} = {k.div(half, 2)}")

    def spread(self, thread: str, lane: str) -> None:
        """Gives the merged results to all lanes. All threads of the block come here."""
        k = self.k
        if self.lanes == 1:
            return
        first = k.let(k.sub(thread, k.mul(lane, self.stride)))
        for arrays, s in zip(self.arrays, self.sums):
            for array, name in zip(arrays, s.names):
                k.line(f"{name} = {k.load(array, first)}")
        k.synchronise()  # before anything else takes the arrays


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
