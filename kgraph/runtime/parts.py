"""Calls with many rows, run a few rows at a time, so that what they compute in between stays in the caches.

Only programs whose rows do not depend on each other are run so (`Program.rows`), and the results are those of calls
with fewer rows. Memory of a call does not grow with the batch then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kgraph.dims import evaluate, symbols
from kgraph.errors import ArtifactError
from kgraph.runtime import threads
from kgraph.runtime.binding import Binding, StepTime

if TYPE_CHECKING:
    from kgraph.runtime.plan import Program

# Every part reads all weights again. More than this share of the bytes that the program moves beside them is not gained
# back by the caches: ResNet50 with 8 rows (three quarters) lost a tenth, a U-Net (half) gained a tenth.
MOST_WEIGHTS = 0.6
LARGE_BYTES = 128 << 20


def rows_at_once(program: Program, whole: Binding) -> int:
    """How many rows a part of a call should have; 0 to run the call as a whole.

    As many as have their temporaries in `program.part_bytes`, and one for each thread at least, since a layer of one
    row may not occupy them all. Where that would read the weights too often, only large calls have parts, with more
    rows each, for the sake of memory.
    """
    rows = whole.sizes.get(program.rows, 0)
    if rows < 2 or whole.arena_bytes <= program.part_bytes or program.donations:
        return 0
    wanted = max(program.part_bytes * rows // whole.arena_bytes, min(whole.threads, rows))
    weights = sum(v.nbytes for v in program.values if v is not None)
    moved = sum(step.bytes for step in whole.steps) - weights
    least = -(-rows // (1 + int(MOST_WEIGHTS * moved / weights))) if weights else 1
    if wanted < least:
        if whole.arena_bytes < LARGE_BYTES:
            return 0
        wanted = least
    parts = -(-rows // wanted)
    return -(-rows // parts) if parts > 1 else 0


class PartedBinding:
    """A program prepared for concrete sizes, which it runs in parts; stands for a `Binding`."""

    def __init__(self, program: Program, whole: Binding, at_once: int):
        """whole: the binding for all rows; at_once: how many of them to run together."""
        self.program, self.sizes, self._whole = program, whole.sizes, whole
        self.generation, self.used = threads.generation, True
        rows = self.sizes[program.rows]
        self.parts = [self._part(first, min(first + at_once, rows)) for first in range(0, rows, at_once)]
        first = self._bound(0)
        self.storage, self.steps, self.threads = first.storage, first.steps, first.threads
        self.num_barriers, self.arena_bytes, self.scratch_bytes = (
            first.num_barriers,
            first.arena_bytes,
            first.scratch_bytes,
        )

    def _part(self, first: int, last: int) -> tuple[dict[str, int], list[slice | None], list[slice | None]]:
        """Sizes of a part, and where its rows lie in each input and each output; None for an input of all rows."""
        program, symbol = self.program, self.program.rows
        before, after, inside = ({**self.sizes, symbol: n} for n in (first, last, last - first))

        def place(b: int) -> slice | None:
            shape = program.buffers[b].shape
            if symbol not in symbols(shape):
                return None
            found = slice(evaluate(shape[0], before), evaluate(shape[0], after))
            # What a plan says of rows is data from outside; a part must fit into its place.
            whole = tuple(evaluate(size, self.sizes) for size in shape)
            if (found.stop - found.start, *whole[1:]) != tuple(evaluate(size, inside) for size in shape):
                raise ArtifactError(f"{program.name}: the rows {symbol} are no rows of {shape}")
            return found

        made = [place(b) for b in program.outputs]
        if None in made:
            raise ArtifactError(f"{program.name}: an output has no rows {symbol}")
        return inside, [place(b) for b in program.inputs], made

    def _bound(self, number: int) -> Binding:
        return self.program.bind(self.parts[number][0])

    # -- what a program asks its bindings ---------------------------------------------------------------------------
    def num_contexts(self) -> int:
        """None: those of the parts are counted there."""
        return 0

    def idle_bytes(self) -> int:
        """Nothing: the memory is that of the parts."""
        return 0

    def release_contexts(self) -> None:
        """Nothing is held."""

    def release_old_params(self) -> None:
        """Nothing is held."""

    # -- calls ------------------------------------------------------------------------------------------------------
    def run(self, arrays: Sequence[np.ndarray]) -> tuple:
        """A call that gives fresh arrays."""
        return self(arrays)

    def __call__(self, arrays: Sequence[np.ndarray], out: Sequence[np.ndarray | None] | None = None) -> tuple:
        """Run on `arrays`; gives fresh arrays, or those of `out`."""
        if self.generation != threads.generation:
            return self.program.bind(self.sizes)(arrays, out)
        self.used = True
        arrays = self._whole.dense_inputs(arrays)
        results, finals = self._whole.check_out(arrays, out or [None] * len(self.program.outputs))
        self.run_into(arrays, results)
        for final, result in zip(finals, results):
            if final is not None and final is not result:
                np.copyto(final, result)
        return tuple([r if f is None else f for f, r in zip(finals, results)])

    def run_into(self, arrays: Sequence[np.ndarray], results: Sequence[np.ndarray]) -> None:
        """As `Binding.run_into`."""
        for number, (_, given, made) in enumerate(self.parts):
            self._bound(number).run_into(_cut(arrays, given), _cut(results, made))

    def profile(self, arrays: Sequence[np.ndarray], repeats: int = 5) -> tuple[tuple, list[StepTime]]:
        """As `Binding.profile`: the times of a step are added up over the parts."""
        arrays = self._whole.dense_inputs(arrays)
        reports = [
            self._bound(n).profile(_cut(arrays, given), repeats)[1] for n, (_, given, _) in enumerate(self.parts)
        ]
        total = [
            StepTime(
                one[0].label,
                one[0].layers,
                sum(s.nanoseconds for s in one),
                sum(s.flops for s in one),
                sum(s.bytes for s in one),
                max(s.threads for s in one),
                one[0].host,
            )
            for one in zip(*reports)
        ]
        return self(arrays), total


def _cut(arrays: Sequence[np.ndarray], places: Sequence[slice | None]) -> list[np.ndarray]:
    return [a if place is None else a[place] for a, place in zip(arrays, places)]


__all__ = ["PartedBinding", "rows_at_once"]
