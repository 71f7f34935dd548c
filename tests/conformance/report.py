"""Counts per folder of Keras' tests, side by side for two backends, as text and as a section of the README."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tests.conformance import gaps
from tests.conformance.runner import ROOT, FileResult

OUTCOMES = ("passed", "failed", "skipped")
BEGIN, END = "<!-- conformance: written by `python -m tests.conformance --readme` -->", "<!-- conformance: end -->"


def folder_of(file: str) -> str:
    """The folder of a test below `keras/src`; backends' own tests by backend."""
    parts = file.removeprefix("keras/src/").split("/")
    return "/".join(parts[:2]) if parts[0] == "backend" else parts[0]


def counts(results: Iterable[FileResult]) -> dict[str, Counter]:
    """folder -> outcome -> number of tests; a crashed test counts as failed. Folders that are not done are left out."""
    by_folder: dict[str, Counter] = {}
    unfinished = set()
    for result in results:
        folder = folder_of(result.file)
        counter = by_folder.setdefault(folder, Counter())
        counter.update("failed" if o == "crashed" else o for o, _ in result.tests.values())
        if not result.done:
            unfinished.add(folder)
    return {folder: counter for folder, counter in sorted(by_folder.items()) if folder not in unfinished}


def table(by_backend: dict[str, dict[str, Counter]]) -> str:
    """A Markdown table: a row per folder, three columns per backend; the total is of the folders that all have."""
    backends = list(by_backend)
    head = ["folder", *(f"{b} {o}" for b in backends for o in OUTCOMES)]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    folders = sorted({f for folders in by_backend.values() for f in folders})
    total: Counter = Counter()
    for folder in folders:
        found = [by_backend[b].get(folder) for b in backends]
        cells = [counter[o] if counter is not None else "–" for counter in found for o in OUTCOMES]
        if None not in found:
            total.update(dict(enumerate(cells)))
        lines.append(f"| {folder} | " + " | ".join(map(str, cells)) + " |")
    lines.append("| **all** | " + " | ".join(f"**{total[i]}**" for i in range(len(head) - 1)) + " |")
    return "\n".join(lines)


def by_category(results: Iterable[FileResult], entries: list[gaps.Gap]) -> Counter:
    """Number of tests that do not pass, by the category of their entry."""
    failing = [t for r in results for t, (o, _) in r.tests.items() if o in ("failed", "crashed")]
    found = (next((g.category for g in entries if g.matches(test)), "no entry") for test in failing)
    return Counter(found)


def only_on(peer: Iterable[FileResult], ours: Iterable[FileResult]) -> Counter:
    """Reasons for which tests that pass on the peer's backend do not on ours."""
    own = {t: outcome for r in ours for t, outcome in r.tests.items()}
    passing = [t for r in peer for t, (o, _) in r.tests.items() if o == "passed" and t in own]
    return Counter(own[t][1][:110] if own[t][0] == "skipped" else own[t][0] for t in passing if own[t][0] != "passed")


def readme_section(ours: list[FileResult], peer: list[FileResult]) -> str:
    """The section's text, from the results of all files on both backends."""
    entries = gaps.load()
    categories = by_category(ours, entries)
    lines = [
        BEGIN,
        table({"kgraph": counts(ours), "JAX": counts(peer)}),
        "",
        "Tests that fail on kgraph, by reason (`tests/conformance/gaps.toml` names each): "
        + "; ".join(f"{gaps.CATEGORIES[c]}: {n}" for c, n in categories.most_common())
        + ".",
        END,
    ]
    return "\n".join(lines)


def write_readme(section: str, path: Path = ROOT / "README.md") -> None:
    """Replace the section between its marks. Raises ValueError where the README has no marks."""
    text = path.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{path} has no place for the section: {BEGIN} ... {END}")
    before, _, rest = text.partition(BEGIN)
    path.write_text(before + section + rest.partition(END)[2])
