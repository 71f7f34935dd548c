"""Counts per folder of a project's tests, side by side for two backends, as text and as a section of the README."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tests.conformance import gaps
from tests.conformance.runner import ROOT, FileResult, below_source

OUTCOMES = ("passed", "failed", "skipped")
# A test that passes on kgraph and was not run on the peer is the peer's at best.
_COUNTED_AS = {"crashed": "failed", "given": "passed"}
# What counts as much longer: seconds of the processor, and times those of the peer.
SLOW_SECONDS, SLOW_RATIO = 5.0, 3.0
# A project's part of the README is between two marks.
MARKS = {
    "keras": ("<!-- conformance: written by `python -m tests.conformance --readme` -->", "<!-- conformance: end -->"),
    "keras_hub": (
        "<!-- KerasHub: written by `python -m tests.conformance --suite keras_hub --readme` -->",
        "<!-- KerasHub: end -->",
    ),
}


def folder_of(file: str) -> str:
    """The folder of a test below the package's `src`; backends' own tests by backend."""
    parts = below_source(file).split("/")
    return "/".join(parts[:2]) if parts[0] == "backend" else parts[0]


def counts(results: Iterable[FileResult]) -> dict[str, Counter]:
    """folder -> outcome -> number of tests, of the files that are done."""
    by_folder: dict[str, Counter] = {}
    for result in results:
        if result.done:
            counter = by_folder.setdefault(folder_of(result.file), Counter())
            counter.update(_COUNTED_AS.get(o, o) for o, _ in result.tests.values())
    return dict(sorted(by_folder.items()))


def _markdown(head: list[str], rows: list[list]) -> str:
    """A Markdown table with a row of totals, of the columns that hold numbers."""
    columns = list(zip(*rows))[1:]
    total = ["**all**", *(f"**{sum(column)}**" if isinstance(column[0], int) else "" for column in columns)]
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows, total]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def table(results: Iterable[FileResult]) -> str:
    """The counts of one backend per folder, as Markdown."""
    rows = [[folder, *(counter[o] for o in OUTCOMES)] for folder, counter in counts(results).items()]
    return _markdown(["folder", *OUTCOMES], rows)


def comparison(ours: list[FileResult], peer: list[FileResult]) -> str:
    """The counts of kgraph and JAX per folder, as Markdown, of the files that are done on both.

    The last column: the tests that pass on JAX alone.
    """
    both = [(a, b) for a, b in zip(ours, peer, strict=True) if a.done and b.done]
    left, right = counts(a for a, _ in both), counts(b for _, b in both)
    alone: Counter = Counter()
    for a, b in both:
        alone[folder_of(a.file)] += sum(only_on([b], [a]).values())
    files, compared = Counter(folder_of(r.file) for r in ours), Counter(folder_of(a.file) for a, _ in both)
    rows = []
    for folder in sorted(left):
        cells = [counter[folder][o] for counter in (left, right) for o in OUTCOMES]
        rows.append([folder, f"{compared[folder]} of {files[folder]}", *cells, alone[folder]])
    head = [f"{b} {o}" for b in ("kgraph", "JAX") for o in OUTCOMES]
    return _markdown(["folder", "files", *head, "JAX alone"], rows)


def by_category(results: Iterable[FileResult], entries: list[gaps.Gap]) -> Counter:
    """Number of tests that do not pass, by the category of their entry, of the files that are done."""
    failing = [t for r in results if r.done for t, (o, _) in r.tests.items() if o in ("failed", "crashed")]
    found = (next((g.category for g in entries if g.matches(test)), "no entry") for test in failing)
    return Counter(found)


def only_on(peer: Iterable[FileResult], ours: Iterable[FileResult]) -> Counter:
    """Reasons for which tests that pass on the peer's backend do not on ours, in files that are done on ours."""
    own = {r.file: r.tests for r in ours if r.done}
    # Some tests exist only where the backend says that it has sparse tensors.
    absent = ("absent", "no such test without sparse tensors")
    found: Counter = Counter()
    for result in peer:
        for test, (outcome, _) in result.tests.items():
            here, reason = own[result.file].get(test, absent) if result.file in own else ("passed", "")
            if outcome == "passed" and here != "passed":  # "given" is what passes here
                found[here if here in ("failed", "crashed") else reason[:110]] += 1
    return found


def slower(ours: Iterable[FileResult], peer: Iterable[FileResult]) -> list[tuple[str, float, float]]:
    """The tests that pass on both and take much longer on ours: (test, seconds on ours, on the peer), worst first."""
    theirs = {test: s for r in peer for test, s in r.processor_seconds.items() if r.tests[test][0] == "passed"}
    found = [
        (test, seconds, theirs[test])
        for result in ours
        for test, seconds in result.processor_seconds.items()
        if test in theirs and seconds > SLOW_SECONDS and seconds > SLOW_RATIO * theirs[test]
    ]
    return sorted(found, key=lambda entry: entry[2] - entry[1])


def _kind(reason: str) -> str:
    """What a reason of `only_on` amounts to."""
    if "sparse" in reason or "ragged" in reason:
        return "need sparse or ragged tensors"
    return "test JAX itself" if "jax" in reason.lower() else "other"


def readme_section(ours: list[FileResult], peer: list[FileResult], package: str = "keras") -> str:
    """The section's text, from the results of all files on both backends."""
    entries = gaps.load(package)
    all_ours = sum(counts(ours).values(), Counter())
    kinds: Counter = Counter()
    for reason, number in only_on(peer, ours).items():
        kinds[_kind(reason)] += number
    failing = by_category(ours, entries).most_common()
    text = (
        f"On kgraph {sum(r.done for r in ours)} of {len(ours)} files have run: "
        + ", ".join(f"{all_ours[o]} {o}" for o in OUTCOMES)
        + ". Failing: "
        + "; ".join(f"{n} ({gaps.CATEGORIES.get(c, c)})" for c, n in failing)
        + ". What passes on kgraph counts as passed on JAX unseen; JAX has run all other tests. "
        + "Passed on JAX and not on kgraph: "
        + ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
        + "."
    )
    begin, end = MARKS[package]
    return "\n".join([begin, comparison(ours, peer), "", *textwrap.wrap(text, 118), end])


def write_readme(section: str, path: Path = ROOT / "README.md") -> None:
    """Replace the section between its marks. Raises ValueError where the README has no marks."""
    text = path.read_text()
    begin, *_, end = section.splitlines()
    if begin not in text or end not in text:
        raise ValueError(f"{path} has no place for the section: {begin} ... {end}")
    before, _, rest = text.partition(begin)
    path.write_text(before + section + rest.partition(end)[2])
