"""Choices between algorithms by measurement, where asked for; the answers are kept in the disk cache.

Estimates decide as long as nobody asks: they cost nothing, and the same model is the same program everywhere. With
`kgraph.compile(model, tune=True)` or `KGRAPH_TUNE=1` the candidates for a problem are run on this machine once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar

from kgraph.codegen.sources import index
from kgraph.codegen.target import host_target
from kgraph.disk_cache import disk_cache

# A candidate replaces the estimated one only if it takes at most this share of its time: clocks are not exact.
LEAST_GAIN = 0.95
# Rounds in which the candidates take turns, as many as fit into the seconds but at least the first number of them.
FEWEST_ROUNDS, MOST_ROUNDS, SECONDS = 3, 20, 0.2

Candidate = Callable[[], Callable[[], object]]

_wanted: ContextVar[bool] = ContextVar("kgraph_tune", default=False)


def is_wanted() -> bool:
    """Whether compiles in this context measure."""
    return _wanted.get() or os.environ.get("KGRAPH_TUNE") == "1"


@contextlib.contextmanager
def tuning(wanted: bool = True) -> Iterator[None]:
    """Within this, compiles measure, if `wanted`."""
    token = _wanted.set(wanted or _wanted.get())
    try:
        yield
    finally:
        _wanted.reset(token)


def decide(problem: tuple, target, estimated: str, candidates: Mapping[str, Candidate]) -> tuple[str, str]:
    """(the candidate to use, what was measured or "") for a problem.

    problem: what the times depend on beside the target. estimated: the candidate to use where nothing is measured.
    candidates: by name, what compiles it and gives a function that runs it once.
    """
    if not is_wanted() or target != host_target():
        return estimated, ""
    seconds = _measured(repr(problem), target, candidates)
    best = min(candidates, key=lambda name: seconds[name])
    if seconds[best] > LEAST_GAIN * seconds[estimated]:
        best = estimated
    return best, ", ".join(f"{name} {seconds[name] * 1e3:.3g} ms" for name in candidates)


def _measured(problem: str, target, candidates: Mapping[str, Candidate]) -> dict[str, float]:
    """The seconds of each candidate, from this process, the cache, or measured now."""
    key = hashlib.sha256(index().digest + repr((problem, target, sorted(candidates))).encode()).hexdigest()[:40]
    found = _known().get(key)
    cache = disk_cache()
    if found is None and cache is not None and (data := cache.get(key)) is not None:
        with contextlib.suppress(ValueError, TypeError, AttributeError):  # an entry that this code has not written
            found = {str(name): float(value) for name, value in json.loads(data).items()}
    if found is None or set(found) != set(candidates):
        found = _measure(candidates)
        if cache is not None:
            cache.put(key, json.dumps(found).encode())
    _known()[key] = found
    return found


@functools.cache
def _known() -> dict[str, dict[str, float]]:
    return {}


def _measure(candidates: Mapping[str, Candidate]) -> dict[str, float]:
    runs = {name: prepare() for name, prepare in candidates.items()}
    for run in runs.values():
        run()  # memory and code come into the caches
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + SECONDS
    for round_ in range(MOST_ROUNDS):
        if round_ >= FEWEST_ROUNDS and time.perf_counter() > end:
            break
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    # The least of several is what other processes disturbed least.
    return {name: min(samples) for name, samples in times.items()}


__all__ = ["decide", "is_wanted", "tuning"]
