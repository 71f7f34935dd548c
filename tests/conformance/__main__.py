"""Runs Keras' own tests on kgraph: `python -m tests.conformance [folder or file below keras/src ...]`.

With `--suite keras_hub --source CHECKOUT` those of KerasHub, whose wheel has none, from a checkout of its repository.

Prints what passed, failed and was skipped per folder, and fails where that and the file of gaps disagree. A run that
was interrupted goes on with the files that it has no results of. Results are kept by file in
`.bench/conformance-results`, those of KerasHub in `.bench/keras-hub-results`.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections import Counter
from pathlib import Path

from benchmarks.environments import python
from tests.conformance import gaps, report
from tests.conformance.runner import PROJECTS, FileResult, Suite


def announce(result: FileResult) -> None:
    tally = Counter(outcome for outcome, _ in result.tests.values())
    print(f"{result.file}: {', '.join(f'{n} {o}' for o, n in tally.items())} ({result.seconds:.0f} s)", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("folders", nargs="*", help="folders or files below the package's src; all by default")
    parser.add_argument("--suite", default="keras", choices=list(PROJECTS), help="whose tests")
    parser.add_argument("--source", type=Path, help="the folder that holds the package; by default the one installed")
    parser.add_argument("--backend", default="kgraph", choices=["kgraph", "jax"], help="what to run them on")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--whole",
        action="store_true",
        help="with JAX: all tests; else those alone that do not pass on kgraph, and JAX counts as passing the others",
    )
    parser.add_argument("--again", action="store_true", help="run what has results too")
    parser.add_argument("--show", action="store_true", help="run nothing: counts from the stored results of both")
    parser.add_argument("--readme", action="store_true", help="as --show, and write the README's section")
    options = parser.parse_args()
    project = PROJECTS[options.suite]
    suite = functools.partial(Suite, python=python(project.environment), project=project, source=options.source)
    ours = suite("kgraph")
    suites = {"kgraph": ours, "jax": suite("jax", given=None if options.whole else ours)}
    files = suites["kgraph"].files(options.folders)
    if options.show or options.readme:
        results, peers = ([suites[name].result(file) for file in files] for name in ("kgraph", "jax"))
        print(report.comparison(results, peers))
        print("\nPassed on JAX only, by the reason on kgraph:")
        for reason, number in report.only_on(peers, results).most_common():
            print(f"{number:6d}  {reason}")
        print("\nMuch slower on kgraph (seconds of the processor, JAX's behind them):")
        for test, seconds, peer_seconds in report.slower(results, peers):
            print(f"{seconds:6.1f} {peer_seconds:6.1f}  {test}")
        if options.readme:
            report.write_readme(report.readme_section(results, peers, project.package))
        return 0
    results = suites[options.backend].run(files, options.processes, options.again, announce)
    print(report.table(results))
    if options.backend != "kgraph":
        return 0
    entries = gaps.load(project.package)
    print("failing, by category:", dict(report.by_category(results, entries)))
    wrong = gaps.complaints(results, entries)
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
