"""Prepared weights of this process, found again by the compiled forms of a model that need the same.

A model has many compiled forms: for `predict` and for generating text, and one for each length and number of rows
where its code asks for these. What they make of a weight ahead of calls is mostly the same, and as large as the weight.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Source(NamedTuple):
    """What a value is made of: a variable or an array, and how often it has been assigned.

    variable: the owner where it may let go of its value for an equal one in another order; see `core.Variable`.
    """

    owner: object
    version: int
    variable: Any = None


class Values(Sequence[np.ndarray]):
    """The values of variables, each of which is read when it is asked for: it may have been let go."""

    def __init__(self, variables: Sequence[Any]):
        self._variables = variables

    def __len__(self) -> int:
        return len(self._variables)

    def __getitem__(self, number):
        return self._variables[number]._value


class Prepared:
    """An array that is made of `sources`, for as long as somebody keeps this object."""

    __slots__ = ("__weakref__", "_owners", "array")

    def __init__(self, array: np.ndarray, sources: Sequence[Source]):
        self.array = array
        self._owners = [weakref.ref(source.owner) for source in sources]

    def is_of(self, sources: Sequence[Source]) -> bool:
        """Whether its sources are these, rather than ones that have taken their place in memory."""
        return all(ref() is source.owner for ref, source in zip(self._owners, sources, strict=True))


_known: weakref.WeakValueDictionary[tuple, Prepared] = weakref.WeakValueDictionary()


def _key(digest: bytes, sources: Sequence[Source]) -> tuple:
    return digest, *((id(source.owner), source.version) for source in sources)


def find(digest: bytes, sources: Sequence[Source]) -> Prepared | None:
    """What has been made of the sources in the way that `digest` stands for, if somebody keeps it."""
    known = _known.get(_key(digest, sources))
    return known if known is not None and known.is_of(sources) else None


def keep(digest: bytes, sources: Sequence[Source], array: np.ndarray) -> Prepared:
    """Let others find an array, which is not written to from now on."""
    prepared = _known[_key(digest, sources)] = Prepared(array, sources)
    return prepared


def is_any_prepared(owners: Iterable[object]) -> bool:
    """Whether something is kept that is made of one of these."""
    wanted = {id(owner) for owner in owners}
    return any(number in wanted for key in list(_known) for number, _ in key[1:])
