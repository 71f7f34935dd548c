"""What a project's tests do not pass on kgraph, and the check that it is neither more nor less.

The entries are in `gaps.toml` for Keras, in `gaps_keras_hub.toml` for KerasHub.
"""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.conformance.runner import FileResult, below_source

PATHS = {
    package: Path(__file__).parent / name
    for package, name in (("keras", "gaps.toml"), ("keras_hub", "gaps_keras_hub.toml"))
}
# What stands in the way of a test. Only the last is kgraph's own.
CATEGORIES = {
    "tensorflow": "needs TensorFlow's own tensors or graphs",
    "accelerator": "needs a GPU, a TPU or several devices",
    "sparse": "sparse or ragged tensors",
    "network": "needs the network",
    "package": "needs a package that the environment does not have",
    "other-tensors": "expects tensors that are not NumPy arrays",
    "keras": "a fault of the test, or a file that the wheel leaves out",
    "kgraph": "a gap of kgraph's",
}


@dataclass(frozen=True)
class Gap:
    """Tests that do not pass. tests: an id below the folder `src`, or a pattern (`*`) of ids; none of them passes.

    Those that need the network may pass, since some machines have one.
    """

    tests: str
    category: str
    reason: str

    def matches(self, test: str) -> bool:
        return fnmatch.fnmatchcase(below_source(test), self.tests.replace("[", "[[]"))


def load(package: str = "keras") -> list[Gap]:
    """All entries of a project. Raises ValueError for one with a category that there is not, or without a reason."""
    path = PATHS[package]
    gaps = [Gap(**entry) for entry in tomllib.loads(path.read_text()).get("gap", [])]
    for gap in gaps:
        if gap.category not in CATEGORIES or not gap.reason:
            raise ValueError(f"{path.name}: {gap.tests!r} needs a reason and a category of {', '.join(CATEGORIES)}")
    return gaps


def complaints(results: Iterable[FileResult], gaps: list[Gap]) -> list[str]:
    """What is wrong between the entries and the results of the files that ran, in words; nothing if they agree."""
    found, hit = [], set()
    names = set()
    for result in results:
        names.add(below_source(result.file))
        for test, (outcome, reason) in result.tests.items():
            gap = next((g for g in gaps if g.matches(test)), None)
            if gap is not None:
                hit.add(gap)
            if gap is None and outcome in ("failed", "crashed"):
                found.append(f"{test} {outcome} and has no entry: {reason}")
            elif gap is not None and outcome == "passed" and gap.category != "network":
                found.append(f"{test} passed; the entry {gap.tests!r} says that it does not")
    for gap in gaps:
        if gap not in hit and any(fnmatch.fnmatchcase(name, gap.tests.partition("::")[0]) for name in names):
            found.append(f"the entry {gap.tests!r} names no test")
    return found
