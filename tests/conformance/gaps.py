"""What Keras' tests do not pass on kgraph, from `gaps.toml`, and the check that it is neither more nor less."""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.conformance.runner import FileResult

PATH = Path(__file__).parent / "gaps.toml"
# What stands in the way of a test. Only the last is kgraph's own.
CATEGORIES = {
    "tensorflow": "needs TensorFlow's own tensors or graphs",
    "accelerator": "needs a GPU, a TPU or several devices",
    "sparse": "sparse or ragged tensors",
    "network": "needs the network",
    "other-tensors": "expects tensors that are not NumPy arrays",
    "keras": "a fault of the test, or a file that the wheel leaves out",
    "kgraph": "a gap of kgraph's",
}


@dataclass(frozen=True)
class Gap:
    """Tests that do not pass. tests: a test's id below `keras/src`, or a pattern (`*`) of ids; none of them passes.

    Those that need the network may pass, since some machines have one.
    """

    tests: str
    category: str
    reason: str

    def matches(self, test: str) -> bool:
        return fnmatch.fnmatchcase(test.removeprefix("keras/src/"), self.tests.replace("[", "[[]"))


def load(path: Path = PATH) -> list[Gap]:
    """All entries. Raises ValueError for one with a category that there is not, or without a reason."""
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
        names.add(result.file.removeprefix("keras/src/"))
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
