"""Times kgraph side by side with its peers: `python -m benchmarks.run`.

Every engine runs in a process of its own; the cases are timed interleaved, round by round, and medians and ratios
are printed. Results go to `benchmarks/results/` with the machine and the versions.
"""

from __future__ import annotations

import argparse
import os
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


def measure(case: models.Case, engines: list[str], rounds: int, seconds: float, folder: Path) -> dict:
    """One case on all engines: medians of interleaved rounds, compile times cold and cached, memory, roofline."""
    request = {"name": case.name, "model": case.model, "batch": case.batch}
    out: dict = {"case": case.key, "engines": {}}
    with tempfile.TemporaryDirectory() as scratch:
        if "kgraph" in engines:
            cold = Worker("kgraph", folder, Path(scratch) / "cache")
            reply = cold.ask("load", case=request)
            cold.close()
            out["compile_cold_s"] = reply.get("compile_s")
        workers = {
            engine: Worker(engine, folder, Path(scratch) / "cache" if engine == "kgraph" else None)
            for engine in engines
        }
        samples: dict[str, list[float]] = {}
        for engine, worker in workers.items():
            reply = worker.ask("load", case=request)
            out["engines"][engine] = reply
            if "error" not in reply:
                samples[engine] = []
        for engine in samples:
            workers[engine].ask("time", seconds=seconds / 2)
        for _ in range(rounds):
            for engine in samples:
                reply = workers[engine].ask("time", seconds=seconds)
                samples[engine].extend(reply.get("ms", []))
        results = {}
        for engine, ms in samples.items():
            entry = out["engines"][engine]
            if not ms:
                continue
            entry["median_ms"] = statistics.median(ms)
            entry["p10_ms"] = float(np.percentile(ms, 10))
            entry["calls"] = len(ms)
            path = Path(scratch) / f"{engine}.npy"
            workers[engine].ask("result", path=str(path))
            results[engine] = np.load(path)
            entry.update(workers[engine].ask("memory"))
        if "kgraph" in samples:
            out["engines"]["kgraph"].update(workers["kgraph"].ask("roofline"))
            reference = next((results[e] for e in ("jax", "onnxruntime", "openvino") if e in results), None)
            if reference is not None:
                out["difference"] = float(np.abs(results["kgraph"] - reference.reshape(results["kgraph"].shape)).max())
        for worker in workers.values():
            worker.close()
    return out


PEAK_GFLOPS_PER_CORE = 115.0  # AVX-512 FMA at 3.5 GHz on the reference machine
BANDWIDTH_GBS = 92.0  # copy bandwidth of a core, read and write


def table(results: list[dict], engines: list[str]) -> str:
    """Markdown table of medians, the ratio to the best peer and the share of the roofline."""
    peers = [e for e in engines if e != "kgraph"]
    head = [
        "case",
        "kgraph ms",
        *[f"{p} ms" for p in peers],
        "best peer",
        "ratio",
        "roofline",
        "cold s",
        "cached s",
        "MB",
    ]
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    ratios = []
    cores = len(os.sched_getaffinity(0))
    for result in results:
        entries = result["engines"]
        ours = entries.get("kgraph", {}).get("median_ms")
        times = {p: entries[p]["median_ms"] for p in peers if "median_ms" in entries.get(p, {})}
        best = min(times, key=times.get) if times else None
        ratio = ours / times[best] if ours and best else None
        if ratio:
            ratios.append(ratio)
        profile = entries.get("kgraph", {}).get("profile") or {}
        share = None
        if ours and profile:
            bound = max(
                profile["flops"] / (PEAK_GFLOPS_PER_CORE * cores * 1e6),
                profile["bytes"] / (BANDWIDTH_GBS * cores * 1e6),
            )
            share = bound / ours
        cells = [
            result["case"],
            f"{ours:.3f}" if ours else entries.get("kgraph", {}).get("error", "")[:60],
            *[f"{times[p]:.3f}" if p in times else "-" for p in peers],
            best or "-",
            f"{ratio:.2f}" if ratio else "-",
            f"{share:.0%}" if share else "-",
            f"{result['compile_cold_s']:.2f}" if result.get("compile_cold_s") else "-",
            f"{entries.get('kgraph', {}).get('compile_s', 0):.2f}",
            f"{entries.get('kgraph', {}).get('peak_mb', 0):.0f}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    imports = [r["engines"]["kgraph"] for r in results if "import_s" in r["engines"].get("kgraph", {})]
    if imports:
        ours, keras = (statistics.median(e[key] for e in imports) for key in ("import_s", "keras_import_s"))
        rows.append(f"\nImport: kgraph {ours:.2f} s on top of Keras' {keras:.2f} s (medians over the cases).")
    if ratios:
        rows.append(f"\nGeometric mean of the ratios: {float(np.exp(np.mean(np.log(ratios)))):.2f}")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default="", help="comma-separated, such as resnet50@1; all by default")
    parser.add_argument("--engines", default="kgraph,jax,onnxruntime,openvino")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="time per engine, case and round")
    parser.add_argument("--output", default="", help="name of the results file, without extension")
    parser.add_argument("--merge", action="store_true", help="replace only the measured cases in that file")
    arguments = parser.parse_args()
    engines = arguments.engines.split(",")
    cases = selected(models.CASES, arguments.cases)
    folder = environments.onnx_folder() if {"onnxruntime", "openvino"} & set(engines) else environments.ROOT / "onnx"
    results = []
    for case in cases:
        start = time.perf_counter()
        results.append(measure(case, engines, arguments.rounds, arguments.seconds, folder))
        print(table(results[-1:], engines).splitlines()[2], f"({time.perf_counter() - start:.0f} s)", flush=True)
    print("\n" + table(results, engines))
    if arguments.output:
        store(arguments.output, "Inference, side by side", results, engines, table, arguments.merge)


if __name__ == "__main__":
    main()
