"""Times training side by side: `python -m benchmarks.train`.

Every engine runs `fit` with Adam on NumPy arrays in a process of its own; the cases are timed interleaved, round by
round, and the medians of the time per step are printed. Results go to `benchmarks/results/` with the machine and the
versions.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import environments
import models
from engines import Worker, selected, store

PEERS = ("jax", "tensorflow", "tensorflow-xla", "torch", "torch-compile")
# Dropout draws other masks in every engine, so that the losses of these are alike only on average.
RANDOM_MODELS = ("mlp", "convnet")


def measure(case: models.Case, engines: list[str], rounds: int, seconds: float, limit: float) -> dict:
    """One case on all engines: time per step, first step cold and cached, memory, and the losses of the first steps."""
    request = {"name": case.name, "model": case.model, "batch": case.batch}
    out: dict = {"case": case.key, "engines": {}}
    workers: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch) / "cache"
        try:
            if "kgraph" in engines:
                workers["kgraph"] = Worker("kgraph", environments.ROOT, cache)
                out["cold"] = workers["kgraph"].ask("load", limit, case=request)
                workers["kgraph"].close()
            for engine in engines:
                workers[engine] = Worker(engine, environments.ROOT, cache)
                out["engines"][engine] = workers[engine].ask("load", limit, case=request)
            running = [engine for engine in engines if "error" not in out["engines"][engine]]
            samples = time_rounds(out["engines"], workers, running, rounds, seconds, limit)
            for engine, ms in samples.items():
                entry = out["engines"][engine]
                entry.update(median_ms=statistics.median(ms), p10_ms=float(np.percentile(ms, 10)), epochs=len(ms))
                entry.update(workers[engine].ask("memory"))
            if "kgraph" in samples:
                out["engines"]["kgraph"].update(workers["kgraph"].ask("program"))
        finally:
            for worker in workers.values():
                worker.close()
    out["loss_difference"] = loss_difference(out["engines"])
    return out


def time_rounds(entries: dict, workers: dict, running: list[str], rounds: int, seconds: float, limit: float) -> dict:
    """Samples by engine. The first round counts for nothing: memory and clocks settle in it."""
    samples: dict[str, list[float]] = {engine: [] for engine in running}
    for number in range(rounds + 1 if rounds else 0):
        for engine in list(samples):
            reply = workers[engine].ask("time", limit, seconds=seconds if number else seconds / 3)
            if "error" in reply:
                entries[engine]["error"] = reply["error"]
                del samples[engine]
            elif number:
                samples[engine].extend(reply["ms"])
    if not rounds:
        return {engine: [entries[engine]["warm_up_ms"]] for engine in running}
    return samples


def loss_difference(entries: dict) -> float | None:
    """Largest relative difference of kgraph's first losses from those of a peer."""
    peer = next((entries[e]["losses"] for e in PEERS if "losses" in entries.get(e, {})), None)
    ours = entries.get("kgraph", {}).get("losses")
    if peer is None or ours is None:
        return None
    return float(np.max(np.abs(np.subtract(ours, peer)) / np.maximum(np.abs(peer), 1e-6)))


def table(results: list[dict], engines: list[str]) -> str:
    """Markdown: milliseconds per step and the ratio to the best peer, then first steps, memory and losses."""
    peers = [engine for engine in engines if engine != "kgraph"]
    head = ["case", *[f"{engine} ms" for engine in engines], "best peer", "ratio"]
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    ratios = []
    notes = []
    for result in results:
        entries = result["engines"]
        times = {e: entries[e]["median_ms"] for e in engines if "median_ms" in entries.get(e, {})}
        best = min((e for e in peers if e in times), key=times.__getitem__, default=None)
        ratio = times["kgraph"] / times[best] if best and "kgraph" in times else None
        if ratio:
            ratios.append(ratio)
        cells = [f"{times[e]:.3f}" if e in times else "-" for e in engines]
        rows.append("| " + " | ".join([result["case"], *cells, best or "-", f"{ratio:.2f}" if ratio else "-"]) + " |")
        notes += [
            f"{result['case']}, {e}: {entries[e]['error'][:200]}" for e in engines if "error" in entries.get(e, {})
        ]
    if ratios:
        rows.append(f"\nGeometric mean of the ratios: {float(np.exp(np.mean(np.log(ratios)))):.2f}")
    rows.append("\n" + "\n\n".join([first_steps(results, engines), memory(results, engines), losses(results)]))
    if notes:
        rows.append("\n" + "\n".join(f"- {note}" for note in notes))
    return "\n".join(rows)


def first_steps(results: list[dict], engines: list[str]) -> str:
    """Seconds from `compile` to the end of the first step."""
    head = ["first step, s", "kgraph, empty cache", *["kgraph, cached" if e == "kgraph" else e for e in engines]]
    rows = []
    for result in results:
        entries = [result.get("cold", {}), *[result["engines"].get(e, {}) for e in engines]]
        rows.append([result["case"], *[_cell(entry.get("first_step_s"), ".2f") for entry in entries]])
    return _markdown(head, rows)


def memory(results: list[dict], engines: list[str]) -> str:
    """Peak resident memory of the processes, in MiB; the arena is where kgraph's intermediate values lie.

    Its bound is the most bytes of them that are alive at one step.
    """
    head = ["peak memory, MiB", *engines, "kgraph's arena", "arena / bound", "kernels"]
    rows = []
    for result in results:
        program = result["engines"].get("kgraph", {}).get("program", {})
        peaks = [_cell(result["engines"].get(e, {}).get("peak_mb"), ".0f") for e in engines]
        bytes_ = program.get("arena_bytes", 0) - program.get("scratch_bytes", 0)
        ratio = bytes_ / program["arena_bound"] if program.get("arena_bound") else None
        arena = bytes_ / 2**20 if bytes_ else None
        cells = [_cell(arena, ".1f"), _cell(ratio, ".2f"), _cell(program.get("kernels"), "d")]
        rows.append([result["case"], *peaks, *cells])
    return _markdown(head, rows)


def losses(results: list[dict]) -> str:
    """How far kgraph's losses of the first steps, all on one batch, are from a peer's."""
    rows = []
    for result in results:
        note = "dropout: other masks" if result["case"].split("@")[0] in RANDOM_MODELS else ""
        rows.append([result["case"], _cell(result.get("loss_difference"), ".1e"), note])
    return _markdown(["losses", "relative difference", ""], rows)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default="", help="comma-separated, such as resnet20@64; all by default")
    parser.add_argument("--further", action="store_true", help="the further architectures instead")
    parser.add_argument("--engines", default=",".join(("kgraph", *PEERS)))
    parser.add_argument("--rounds", type=int, default=5, help="0 measures first steps, memory and losses only")
    parser.add_argument("--seconds", type=float, default=3.0, help="time per engine, case and round")
    parser.add_argument(
        "--limit", type=float, default=120.0, help="seconds after which an engine is given up for a case"
    )
    parser.add_argument("--output", default="", help="name of the results file, without extension")
    parser.add_argument("--merge", action="store_true", help="replace only the measured cases in that file")
    arguments = parser.parse_args()
    engines = arguments.engines.split(",")
    results = []
    cases = models.FURTHER_TRAINING_CASES if arguments.further else models.TRAINING_CASES
    for case in selected(cases, arguments.cases):
        start = time.perf_counter()
        results.append(measure(case, engines, arguments.rounds, arguments.seconds, arguments.limit))
        print(table(results[-1:], engines).splitlines()[2], f"({time.perf_counter() - start:.0f} s)", flush=True)
        if arguments.output:  # after every case: a long run that is ended keeps what it has measured
            title = "Training of further architectures" if arguments.further else "Training"
            store(arguments.output, f"{title}, side by side", results, engines, table, arguments.merge)
    print("\n" + table(results, engines))


if __name__ == "__main__":
    main()
