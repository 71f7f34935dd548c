"""Times kgraph side by side with its peers: `python -m benchmarks.run`.

Every engine runs in a process of its own; the cases are timed interleaved, round by round, and medians and ratios
are printed, then the kernels that lose most against the machine's limits. Results go to `benchmarks/results/` with the
machine and the versions.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import environments
import limits
import models
from engines import ENGINES, Worker, selected, store

DEFAULT_ENGINES = "kgraph,kgraph-one-thread,kgraph-saved,jax,onnxruntime,openvino"


def measure(case: models.Case, engines: list[str], rounds: int, seconds: float, folder: Path, limit: float) -> dict:
    """One case on all engines: medians of interleaved rounds, compile times cold and cached, memory, roofline."""
    request = {"name": case.name, "model": case.model, "batch": case.batch}
    out: dict = {"case": case.key, "engines": {}}
    with tempfile.TemporaryDirectory() as scratch:
        cache, saved = Path(scratch) / "cache", str(Path(scratch) / "model.kgraph")
        workers: dict[str, Worker] = {}
        try:
            if "kgraph" in engines:
                workers["kgraph"] = Worker("kgraph", folder, cache)
                out["compile_cold_s"] = workers["kgraph"].ask("load", case=request).get("compile_s")
                reply = workers["kgraph"].ask("save", path=saved) if "kgraph-saved" in engines else {}
                workers["kgraph"].close()
            for engine in engines:
                workers[engine] = Worker(engine, folder, None if ENGINES[engine].is_peer else cache)
                out["engines"][engine] = workers[engine].ask("load", limit, case={**request, "saved": saved})
                if engine == "kgraph-saved" and "error" in reply:
                    out["engines"][engine]["error"] = f"saving: {reply['error']}"
            samples = time_rounds(workers, [e for e in engines if "error" not in out["engines"][e]], rounds, seconds)
            results = {}
            for engine, ms in samples.items():
                entry = out["engines"][engine]
                entry.update(median_ms=statistics.median(ms), p10_ms=float(np.percentile(ms, 10)), calls=len(ms))
                path = Path(scratch) / f"{engine}.npy"
                workers[engine].ask("result", path=str(path))
                results[engine] = np.load(path)
                entry.update(workers[engine].ask("memory"))
            if "kgraph" in samples:
                out["engines"]["kgraph"].update(workers["kgraph"].ask("roofline"))
                reference = next((results[e] for e in results if ENGINES[e].is_peer), None)
                if reference is not None:
                    ours = results["kgraph"]
                    out["difference"] = float(np.abs(ours - reference.reshape(ours.shape)).max())
        finally:
            for worker in workers.values():
                worker.close()
    return out


def time_rounds(workers: dict[str, Worker], running: list[str], rounds: int, seconds: float) -> dict:
    """Milliseconds per call by engine, of interleaved rounds; a first half round counts for nothing."""
    samples: dict[str, list[float]] = {engine: [] for engine in running}
    for number in range(rounds + 1):
        for engine in samples:
            reply = workers[engine].ask("time", seconds=seconds if number else seconds / 2)
            if number:
                samples[engine].extend(reply.get("ms", []))
    return {engine: ms for engine, ms in samples.items() if ms}


def bound_ms(flops: float, bytes_: float) -> float:
    """The least time that the machine's arithmetic and caches allow, in milliseconds, on all cores."""
    measured = limits.measured()
    return max(flops / (measured["gflops"] * 1e6), bytes_ / (measured["cache_gbs"] * 1e6))


def table(results: list[dict], engines: list[str]) -> str:
    """Markdown: medians, the ratio to the best peer and the share of the roofline, then memory."""
    peers = [e for e in engines if ENGINES[e].is_peer]
    head = ["case", "kgraph ms", *[f"{p} ms" for p in peers], "best peer", "ratio", "roofline", "threads 1 / 2"]
    rows = ["| " + " | ".join([*head, "cold s", "cached s"]) + " |", "|" + "---|" * (len(head) + 2)]
    ratios, memory, notes = [], [], []
    for result in results:
        entries = result["engines"]
        times = {e: entries[e]["median_ms"] for e in engines if "median_ms" in entries.get(e, {})}
        ours, alone = times.get("kgraph"), times.get("kgraph-one-thread")
        best = min((p for p in peers if p in times), key=times.__getitem__, default=None)
        ratio = ours / times[best] if ours and best else None
        if ratio:
            ratios.append(ratio)
        mine = entries.get("kgraph", {})
        profile = mine.get("profile")
        share = bound_ms(profile["flops"], profile["bytes"]) / ours if ours and profile else None
        cells = [result["case"], *(_cell(times.get(e), ".3f") for e in ("kgraph", *peers)), best or "-"]
        cells += [_cell(ratio, ".2f"), _cell(share, ".0%"), _cell(alone / ours if alone and ours else None, ".2f")]
        cells += [_cell(result.get("compile_cold_s"), ".2f"), _cell(mine.get("compile_s"), ".2f")]
        rows.append("| " + " | ".join(cells) + " |")
        memory.append([result["case"], *(_cell(entries.get(e, {}).get("peak_mb"), ".0f") for e in engines)])
        notes += [
            f"{result['case']}, {e}: {entries[e]['error'][:200]}" for e in engines if "error" in entries.get(e, {})
        ]
    if ratios:
        rows.append(f"\nGeometric mean of the ratios: {float(np.exp(np.mean(np.log(ratios)))):.2f}")
    imports = [r["engines"]["kgraph"] for r in results if "import_s" in r["engines"].get("kgraph", {})]
    if imports:
        ours, keras = (statistics.median(e[key] for e in imports) for key in ("import_s", "keras_import_s"))
        rows.append(f"\nImport: kgraph {ours:.2f} s on top of Keras' {keras:.2f} s (medians over the cases).")
    rows.append("\n| peak memory, MiB | " + " | ".join(engines) + " |\n|" + "---|" * (len(engines) + 1))
    rows += ["| " + " | ".join(line) + " |" for line in memory]
    if notes:
        rows.append("\n" + "\n".join(f"- {note}" for note in notes))
    return "\n".join(rows)


def lossy_kernels(result: dict, number: int = 8) -> str:
    """The kernels of a case that lose most time against the machine's limits; equal ones are added up."""
    groups: dict[tuple, list] = defaultdict(list)
    for kernel in result["engines"].get("kgraph", {}).get("kernels", []):
        groups[kernel["kernel"], kernel["result"]].append(kernel)
    lines = []
    for (label, shape), members in groups.items():
        us = sum(k["us"] for k in members)
        bound = sum(bound_ms(k["flops"], k["bytes"]) for k in members) * 1e3
        lines.append((us - bound, f"{us:10.1f} us {bound / max(us, 1e-3):5.0%} {len(members):3d} x {label} {shape}"))
    return "\n".join(text for _, text in sorted(lines, reverse=True)[:number])


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default="", help="comma-separated, such as resnet50@1; all by default")
    parser.add_argument("--further", action="store_true", help="the further architectures instead")
    parser.add_argument("--engines", default=DEFAULT_ENGINES, help=f"of {', '.join(ENGINES)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="time per engine, case and round")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds in which an engine has to be ready")
    parser.add_argument("--output", default="", help="name of the results file, without extension")
    parser.add_argument("--merge", action="store_true", help="replace only the measured cases in that file")
    arguments = parser.parse_args()
    engines = arguments.engines.split(",")
    cases = selected(models.FURTHER_CASES if arguments.further else models.CASES, arguments.cases)
    folder = environments.ROOT / "onnx"
    if {"onnxruntime", "openvino"} & set(engines):
        folder = environments.onnx_folder(dict.fromkeys(case.model for case in cases))
    results = []
    for case in cases:
        start = time.perf_counter()
        results.append(measure(case, engines, arguments.rounds, arguments.seconds, folder, arguments.limit))
        print(table(results[-1:], engines).splitlines()[2], f"({time.perf_counter() - start:.0f} s)", flush=True)
        print(lossy_kernels(results[-1]), flush=True)
    print("\n" + table(results, engines))
    if arguments.output:
        title = "Inference of further architectures" if arguments.further else "Inference"
        store(arguments.output, f"{title}, side by side", results, engines, table, arguments.merge)


if __name__ == "__main__":
    main()
