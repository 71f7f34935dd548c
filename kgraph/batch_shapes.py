"""Which sizes of a step's batches are symbolic: as few as the batches seen so far ask for.

The first batch of a kind fixes every size but the common first one, N. When a batch comes with other sizes, the axes
that differ become symbols as well, so that sequences of ever new lengths run in the second program. Axes that change
together get one symbol.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from kgraph.ir import Dim

Size = int | str  # a number, or the name of a symbol
Shapes = Sequence[tuple[int, ...]]
Pattern = tuple[tuple[Size, ...], ...]  # the shape of every array of a batch
Position = tuple[int, int]  # number of an array, axis


@dataclass
class _Family:
    """Batches of one structure, with the same dtypes and ranks.

    patterns: what was compiled for, from the particular to the general. pinned: axes that have to be numbers.
    """

    pinned: set[Position]
    patterns: list[Pattern] = field(default_factory=list)


class BatchShapes:
    """Gives every batch a pattern of sizes, which is what a program is compiled for."""

    def __init__(self, symbolic_batch: bool = True):
        """symbolic_batch: False where the first axis of every array stays a number."""
        self._symbolic_batch = symbolic_batch
        self._families: dict[Hashable, _Family] = {}

    def pattern_for(self, kind: Hashable, shapes: Shapes) -> Pattern:
        """The pattern to compile for or to run: a known one that fits, else one that covers the known ones too.

        kind: structure and dtypes of the batch.
        """
        family = self._family(kind, shapes)
        for pattern in family.patterns:
            if _fits(pattern, shapes):
                return pattern
        pattern = self._first(family, shapes)
        if family.patterns:
            pattern = _generalised(family.patterns[-1], pattern, shapes, family.pinned)
        family.patterns.append(pattern)
        return pattern

    def pin(self, kind: Hashable, shapes: Shapes, symbols: Iterable[str]) -> set[Position]:
        """Let the axes that these symbols name in the latest pattern be numbers from now on, and forget the pattern.

        Gives the axes.
        """
        family, names = self._family(kind, shapes), set(symbols)
        pattern = family.patterns.pop()
        pinned = {(i, axis) for i, shape in enumerate(pattern) for axis, s in enumerate(shape) if s in names}
        family.pinned |= pinned
        return pinned

    def forget(self, pattern: Pattern, unpinned: set[Position] | None = None) -> None:
        """Drop a pattern for which there is no program, and let axes be symbolic again that were pinned for it."""
        for family in self._families.values():
            if any(p is pattern for p in family.patterns):
                family.patterns = [p for p in family.patterns if p is not pattern]
                family.pinned -= unpinned or set()

    def _family(self, kind: Hashable, shapes: Shapes) -> _Family:
        together = _common_rows(shapes) is not None
        # Sizes 0 and 1 stay apart: a size of 1 broadcasts, and a reduction over nothing may be an error.
        special = tuple(tuple(s if s < 2 else -1 for s in (shape[1:] if together else shape)) for shape in shapes)
        key = kind, together, special
        if key not in self._families:
            pinned = set() if self._symbolic_batch else {(i, 0) for i, shape in enumerate(shapes) if shape}
            self._families[key] = _Family(pinned)
        return self._families[key]

    @staticmethod
    def _first(family: _Family, shapes: Shapes) -> Pattern:
        """Numbers, but for the first axis that all arrays share."""
        together = _common_rows(shapes) is not None and not any((i, 0) in family.pinned for i in range(len(shapes)))
        return tuple(("N", *shape[1:]) if together else tuple(shape) for shape in shapes)


def symbolic(pattern: Pattern) -> list[tuple[int | Dim, ...]]:
    """The shapes of a pattern with a `Dim` for every symbol."""
    return [tuple(Dim.symbol(s) if isinstance(s, str) else s for s in shape) for shape in pattern]


def symbols_of(pattern: Pattern) -> set[str]:
    """The symbols of a pattern other than the batch's, N."""
    return {s for shape in pattern for s in shape if isinstance(s, str) and s != "N"}


def _common_rows(shapes: Shapes) -> int | None:
    """The size of the first axis that all arrays have; None where it is not one size."""
    rows = {shape[0] if shape else None for shape in shapes}
    return rows.pop() if len(rows) == 1 else None


def _fits(pattern: Pattern, shapes: Shapes) -> bool:
    bound: dict[Size, int] = {}
    for sizes, shape in zip(pattern, shapes, strict=True):
        for size, actual in zip(sizes, shape, strict=True):
            if (actual != size) if isinstance(size, int) else bound.setdefault(size, actual) != actual:
                return False
    return True


def _generalised(old: Pattern, fresh: Pattern, shapes: Shapes, pinned: set[Position]) -> Pattern:
    """The least general pattern that covers `old` and a batch of these shapes, apart from the pinned axes.

    fresh: the pattern of the batch on its own; its N stays where `old` has it too.
    """
    names: dict[tuple[Size, int], str] = {}
    taken: set[str] = {"N"}

    def size(i: int, axis: int) -> Size:
        before, now, actual = old[i][axis], fresh[i][axis], shapes[i][axis]
        if (i, axis) in pinned:
            return actual
        if before == now:
            return now
        if (before, actual) not in names:
            name, count = f"L{axis}", 1
            while name in taken:
                count += 1
                name = f"L{axis}_{count}"
            taken.add(name)
            names[before, actual] = name
        return names[before, actual]

    return tuple(tuple(size(i, axis) for axis in range(len(shape))) for i, shape in enumerate(shapes))


__all__ = ["BatchShapes", "Pattern", "Position", "symbolic", "symbols_of"]
