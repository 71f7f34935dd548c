"""Times float32, bf16 and int8 of one model side by side, with their errors: `python -m benchmarks.precision`.

bf16 is `kgraph.compile(model, precision="bf16")`, int8 is `model.quantize("int8")` of Keras, compiled. Beside them runs
ONNX Runtime on the float32 model and on what its dynamic quantisation to int8 makes of it. Errors are root mean squares
of the differences from kgraph's float32, as a fraction of that result. Every engine has a process of its own, on the
cores that it is given; calls are timed interleaved.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import environments
import models
from engines import ENGINES, Worker, selected, store
from run import time_rounds

CASES = [models.Case("infer", *case) for case in (("mlp", 1), ("mlp", 256), ("transformer", 1), ("transformer", 16))]
CASES += [models.Case("infer", "gpt", 1)]
DEFAULT_ENGINES = "kgraph,kgraph-bf16,kgraph-int8,onnxruntime,onnxruntime-int8"


def measure(case: models.Case, engines: list[str], rounds: int, seconds: float, folder: Path, limit: float) -> dict:
    """One case on all engines, on the cores that this process may use: times, and errors against float32."""
    request = {"name": case.name, "model": case.model, "batch": case.batch}
    cores = len(os.sched_getaffinity(0))
    out: dict = {"case": f"{case.key}, {cores} thread{'s' if cores > 1 else ''}", "engines": {}}
    workers: dict[str, Worker] = {}
    try:
        for engine in engines:
            workers[engine] = Worker(engine, folder)
            out["engines"][engine] = workers[engine].ask("load", limit, case=request)
        running = [e for e in engines if "error" not in out["engines"][e]]
        samples = time_rounds(workers, running, rounds, seconds)
        results: dict[str, np.ndarray] = {}
        with tempfile.TemporaryDirectory() as scratch:
            for engine, ms in samples.items():
                path = Path(scratch) / f"{engine}.npy"
                workers[engine].ask("result", path=str(path))
                results[engine] = np.load(path).astype(np.float64)
                entry = out["engines"][engine]
                entry.update(median_ms=statistics.median(ms), p10_ms=float(np.percentile(ms, 10)), calls=len(ms))
                entry.update(workers[engine].ask("memory"))
    finally:
        for worker in workers.values():
            worker.close()
    exact = results.get("kgraph")
    if exact is not None:
        for engine, result in results.items():
            error = np.sqrt(np.mean((result.reshape(exact.shape) - exact) ** 2) / np.mean(exact**2))
            out["engines"][engine]["error"] = float(error)
    return out


def table(results: list[dict], engines: list[str]) -> str:
    """Markdown: per engine the time that a tenth of the calls stay below, which other processes disturb least; the gain
    over the engine's own float32; the error."""
    head = ["case", *[f"{e}, ms" for e in engines]]
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    notes = []
    for result in results:
        cells = [result["case"]]
        for engine in engines:
            entry = result["engines"].get(engine, {})
            if "p10_ms" not in entry:
                cells.append("-")
                notes.append(f"- {result['case']}, {engine}: {str(entry.get('error', 'not measured'))[:200]}")
                continue
            text = f"{entry['p10_ms']:.3f}"
            base = result["engines"].get(engine.partition("-")[0], {}).get("p10_ms")
            if base and "-" in engine:
                text += f" ({base / entry['p10_ms']:.2f}x, error {entry['error']:.1e})"
            cells.append(text)
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join([*rows, *([""] if notes else []), *notes])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default="", help="comma-separated, such as mlp@1; all by default")
    parser.add_argument("--engines", default=DEFAULT_ENGINES, help=f"of {', '.join(ENGINES)}")
    parser.add_argument("--threads", default="1,2", help="numbers of cores, one after the other")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="time per engine, case and round")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds in which an engine has to be ready")
    parser.add_argument("--output", default="", help="name of the results file, without extension")
    parser.add_argument("--merge", action="store_true", help="replace only the measured cases in that file")
    arguments = parser.parse_args()
    engines, cases = arguments.engines.split(","), selected(CASES, arguments.cases)
    folder = environments.onnx_folder(dict.fromkeys(case.model for case in cases))
    available = sorted(os.sched_getaffinity(0))
    results = []
    for case in cases:
        for threads in map(int, arguments.threads.split(",")):
            os.sched_setaffinity(0, available[:threads])
            results.append(measure(case, engines, arguments.rounds, arguments.seconds, folder, arguments.limit))
            print(table(results[-1:], engines).splitlines()[2], flush=True)
    os.sched_setaffinity(0, available)
    print("\n" + table(results, engines))
    if arguments.output:
        store(arguments.output, "Precisions, side by side", results, engines, table, arguments.merge)


if __name__ == "__main__":
    main()
