"""All that wants a GPU: `python -m benchmarks.gpu`. Nothing is downloaded; peers run where they are installed.

First the oracle tests on the device (records, models, training steps), then what kernels reach of the copy bandwidth
and what a launch costs, then inference and training at GPU-sized batches, kgraph beside JAX and PyTorch (compiled),
each in a process of its own, interleaved. Writes `results/gpu.json` and `.md` with device, driver and versions.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import models
from engines import Worker, selected, store

ENGINES = {"kgraph-gpu": "numba", "jax-gpu": "jax", "torch-compile-gpu": "torch"}
CASES = [
    models.Case(kind, model, batch)
    for kind, batches in {
        "infer": {
            "tiny_mlp": 1024,
            "mlp": 4096,
            "convnet": 1024,
            "resnet20": 1024,
            "transformer": 128,
            "lstm": 512,
            "resnet50": 128,
            "mobilenetv2": 128,
            "efficientnetb0": 64,
        },
        "train": {
            "tiny_mlp": 1024,
            "mlp": 4096,
            "convnet": 1024,
            "resnet20": 512,
            "transformer": 64,
            "lstm": 512,
            "mobilenetv2": 64,
        },
    }.items()
    for model, batch in batches.items()
]
TESTS = [f"tests/cuda/test_{name}.py" for name in ("records", "models", "training_steps")]


def oracle_tests(device: str, seconds: float, expression: str = "") -> dict:
    """Outcomes of the tests that run on a device: the last line of pytest, and the names of those that fail.

    expression: leaves tests out, as pytest's `-k` does.
    """
    root = Path(__file__).resolve().parent.parent
    environment = dict(os.environ, KGRAPH_TEST_DEVICE=device)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", "-k", expression, *TESTS]
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode()
        return {"summary": f"not done after {seconds:.0f} s", "failed": re.findall(r"^FAILED (\S+)", output, re.M)}
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no output"]
    return {"summary": lines[-1], "failed": re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)}


def measure(case: models.Case, engines: list[str], rounds: int, seconds: float, limit: float) -> dict:
    """One case on all engines: medians of interleaved rounds, and the largest difference of results."""
    request = {"name": f"gpu-{case.name}", "model": case.model, "batch": case.batch}
    out: dict = {"case": f"{case.name} {case.key}", "engines": {}}
    workers: dict[str, Worker] = {}
    try:
        for engine in engines:
            workers[engine] = Worker(engine, Path())
            out["engines"][engine] = workers[engine].ask("load", limit, case=request)
        samples: dict[str, list[float]] = {e: [] for e in engines if "error" not in out["engines"][e]}
        for number in range(rounds + 1):
            for engine in samples:
                reply = workers[engine].ask("time", limit, seconds=seconds)
                if "error" in reply:
                    out["engines"][engine]["error"] = reply["error"]
                elif number:
                    samples[engine].extend(reply["ms"])
        for engine, ms in samples.items():
            if ms:
                out["engines"][engine]["median_ms"] = statistics.median(ms)
        if case.name == "infer":
            out["difference"] = _difference(workers, list(samples))
    finally:
        for worker in workers.values():
            worker.close()
    return out


def _difference(workers: dict[str, Worker], engines: list[str]) -> float | None:
    """Largest difference of kgraph's result from that of the first peer."""
    with tempfile.TemporaryDirectory() as scratch:
        for engine in engines:
            workers[engine].ask("result", path=f"{scratch}/{engine}.npy")
        found = {e: np.load(f"{scratch}/{e}.npy") for e in engines if Path(f"{scratch}/{e}.npy").exists()}
    peer = next((y for e, y in found.items() if e != "kgraph-gpu"), None)
    ours = found.get("kgraph-gpu")
    return None if peer is None or ours is None else float(np.abs(ours - peer).max())


def limits(megabytes: float) -> dict:
    """Bandwidth of simple kernels beside that of a copy, and microseconds per launch."""
    worker = Worker("kgraph-gpu", Path())
    try:
        reply = worker.ask("load", case={"name": "gpu-limits", "batch": megabytes})
        return reply if "error" in reply else worker.ask("time", seconds=0)
    finally:
        worker.close()


def table(results: list[dict], engines: list[str]) -> str:
    """Markdown: tests, limits, then milliseconds and ratios."""
    rows = []
    for result in results:
        if "tests" in result:
            tests = result["tests"]
            rows.append(f"Oracle tests on the device: {tests['summary']}")
            rows += [f"- failed: {name}" for name in tests["failed"]]
        if "limits" in result:
            found = result["limits"]
            rows.append(
                "\nLimits: "
                + ", ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items())
            )
    head = ["case", *[f"{e} ms" for e in engines], "ratio to the best peer", "difference", "host steps"]
    rows += ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    ratios = []
    for result in results:
        if "engines" not in result:
            continue
        entries = result["engines"]
        times = {e: entries[e]["median_ms"] for e in engines if "median_ms" in entries.get(e, {})}
        peers = [times[e] for e in times if e != "kgraph-gpu"]
        ratio = times["kgraph-gpu"] / min(peers) if peers and "kgraph-gpu" in times else None
        if ratio:
            ratios.append(ratio)
        cells = [f"{times[e]:.3f}" if e in times else entries.get(e, {}).get("error", "-")[:60] for e in engines]
        cells += [f"{ratio:.2f}" if ratio else "-"]
        cells += ["-" if result.get("difference") is None else f"{result['difference']:.1e}"]
        cells += [str(entries.get("kgraph-gpu", {}).get("host_steps", "-"))]
        rows.append("| " + " | ".join([result["case"], *cells]) + " |")
    if ratios:
        rows.append(f"\nGeometric mean of the ratios: {float(np.exp(np.mean(np.log(ratios)))):.2f}")
    return "\n".join(rows)


def driver_version() -> str:
    """What `nvidia-smi` says of device and driver."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "no nvidia-smi"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cuda-simulator to try the command itself")
    parser.add_argument("--cases", default="", help="comma-separated, such as resnet50@128 or resnet50; all by default")
    parser.add_argument("--batch", type=int, default=0, help="instead of the cases' own")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="time per engine, case and round")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds in which an engine has to answer")
    parser.add_argument("--megabytes", type=float, default=256, help="of the operands whose bandwidth is measured")
    parser.add_argument("--tests", type=float, default=300.0, help="seconds that the tests may take; 0 leaves them out")
    parser.add_argument("--only", default="", help="expression of pytest's -k for the tests")
    parser.add_argument("--output", default="gpu", help="name of the results file, or a path, without extension")
    arguments = parser.parse_args()
    os.environ["KGRAPH_BENCH_DEVICE"] = arguments.device
    engines = [e for e, package in ENGINES.items() if importlib.util.find_spec(package)]
    if arguments.device == "cuda-simulator":
        os.environ["NUMBA_ENABLE_CUDASIM"] = "1"
        engines = ["kgraph-gpu"]
    print(driver_version(), engines, flush=True)
    results: list[dict] = []
    if arguments.tests:
        results.append({"case": "tests", "tests": oracle_tests(arguments.device, arguments.tests, arguments.only)})
        print(results[-1], flush=True)
    results.append({"case": "limits", "limits": {"driver": driver_version(), **limits(arguments.megabytes)}})
    print(results[-1], flush=True)
    for case in selected(CASES, arguments.cases):
        if arguments.batch:
            case = models.Case(case.name, case.model, arguments.batch)
        start = time.perf_counter()
        results.append(measure(case, engines, arguments.rounds, arguments.seconds, arguments.limit))
        print(table(results[-1:], engines).splitlines()[3], f"({time.perf_counter() - start:.0f} s)", flush=True)
    print("\n" + table(results, engines))
    if arguments.output:
        store(arguments.output, "On a GPU", results, engines, table, False)


if __name__ == "__main__":
    main()
