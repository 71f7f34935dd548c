"""How much faster all cores are than one: `python -m benchmarks.scaling`.

Round by round, the same program runs in a process with one thread, in one with a thread for every core, and in as many
processes of one thread at the same time as there are cores. What those do together is the bound: they share nothing but
the memory, the caches and what else runs on the machine, and never wait for one another. A kernel for which memory is
the limit scales no better than they do.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import environments
import models
from engines import Worker, selected, store

LEAST_MS = 5.0  # of a call on all cores: shorter ones are not in the table


def measure(case: models.Case, rounds: int, seconds: float) -> dict:
    """Median milliseconds of a call or step: of one thread, of all, and of one thread beside other processes."""
    request = {"name": case.name, "model": case.model, "batch": case.batch}
    samples: dict[str, list[float]] = {"one": [], "all": [], "beside": []}
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(cores) as pool:
        alone = [Worker("kgraph-one-thread", environments.ROOT, Path(cache)) for _ in range(cores)]
        together = Worker("kgraph", environments.ROOT, Path(cache))
        try:
            for worker in (together, *alone):
                reply = worker.ask("load", case=request)
                if "error" in reply:
                    return {"case": case.key, "error": reply["error"]}
            for number in range(rounds + 1):
                found = {
                    "one": alone[0].ask("time", seconds=seconds)["ms"],
                    "all": together.ask("time", seconds=seconds)["ms"],
                    "beside": [
                        ms
                        for reply in pool.map(lambda worker: worker.ask("time", seconds=seconds), alone)
                        for ms in reply["ms"]
                    ],
                }
                if number:  # the first round counts for nothing
                    for name, ms in found.items():
                        samples[name] += ms
        finally:
            for worker in (together, *alone):
                worker.close()
    medians = {f"{name}_ms": statistics.median(ms) for name, ms in samples.items()}
    return {"case": case.key, **medians, "cores": cores}


def table(results: list[dict], engines: list[str]) -> str:
    """Markdown: times, the factor by which all threads are faster than one, and that of separate processes."""
    rows = ["| case | one thread ms | all threads ms | faster by | separate processes by | of that |", "|" + "---|" * 6]
    for result in results:
        if "error" in result:
            rows.append(f"| {result['case']} | {result['error']} |" + " - |" * 4)
        elif result["all_ms"] >= LEAST_MS:
            faster = result["one_ms"] / result["all_ms"]
            bound = result["cores"] * result["one_ms"] / result["beside_ms"]
            cells = [f"{result['one_ms']:.2f}", f"{result['all_ms']:.2f}", f"{faster:.2f}", f"{bound:.2f}"]
            rows.append(f"| {result['case']} | " + " | ".join(cells) + f" | {faster / bound:.0%} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default="", help="comma-separated, such as resnet50@1; all by default")
    parser.add_argument("--train", action="store_true", help="training steps in place of inference")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.5, help="time per process, case and round")
    parser.add_argument("--output", default="", help="name of the results file, without extension")
    parser.add_argument("--merge", action="store_true", help="replace only the measured cases in that file")
    arguments = parser.parse_args()
    results = []
    inference, training = models.CASES + models.FURTHER_CASES, models.TRAINING_CASES + models.FURTHER_TRAINING_CASES
    for case in selected(training if arguments.train else inference, arguments.cases):
        start = time.perf_counter()
        results.append(measure(case, arguments.rounds, arguments.seconds))
        lines = table(results[-1:], []).splitlines()
        print(
            *(lines[2:] or [f"{case.key}: shorter than {LEAST_MS} ms"]),
            f"({time.perf_counter() - start:.0f} s)",
            flush=True,
        )
    print("\n" + table(results, []))
    if arguments.output:
        title = "Training: all threads against one" if arguments.train else "Inference: all threads against one"
        store(arguments.output, title, results, ["kgraph"], table, arguments.merge)


if __name__ == "__main__":
    main()
