"""Times the start of a saved model in fresh processes, beside ONNX Runtime: `python -m benchmarks.load`.

A process imports NumPy and kgraph, loads ResNet50 (batch 1) and calls it once; another does the same with ONNX Runtime
and the model as ONNX. Medians of runs in turn; the files are in the system's cache, as after a first start.
Also, where a C compiler is found, the time of a call of `tiny_mlp` from C.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import engines
import environments

ROOT = Path(__file__).resolve().parent.parent

KGRAPH = """
import time; begin = time.perf_counter()
import json, resource, sys
import numpy as np
numpy = time.perf_counter()
import kgraph
load = kgraph.load
imported = time.perf_counter()
model = load(sys.argv[1])
loaded = time.perf_counter()
model(np.zeros((1, 224, 224, 3), np.float32))
called = time.perf_counter()
assert not {"keras", "numba", "llvmlite", "kgraph.codegen"} & set(sys.modules)
print(json.dumps({
    "import numpy": numpy - begin, "import kgraph": imported - numpy, "load": loaded - imported,
    **{"load: " + k: v for k, v in model.stats()["seconds"].items()}, "first call": called - loaded,
    "load to first result": called - imported, "process": called - begin,
    "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
"""
ONNX_RUNTIME = """
import time; begin = time.perf_counter()
import json, resource, sys
import numpy as np
import onnxruntime
imported = time.perf_counter()
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
loaded = time.perf_counter()
session.run(None, {session.get_inputs()[0].name: np.zeros((1, 224, 224, 3), np.float32)})
called = time.perf_counter()
print(json.dumps({"load": loaded - imported, "first call": called - loaded, "load to first result": called - imported,
                  "process": called - begin, "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
"""
SAVE = """
import sys, kgraph, models
kgraph.compile(models.build("resnet50")).save(sys.argv[1], levels="native", rebuildable=False)
kgraph.compile(models.build("tiny_mlp")).export(sys.argv[2], format="c")
models.example_inputs("tiny_mlp", 1).tofile(sys.argv[2] + "/input")
"""


def run(interpreter, script: str, *arguments, environment: dict) -> str:
    command = [interpreter, "-c", script, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def medians(runs: list[dict]) -> dict:
    return {key: statistics.median(r[key] for r in runs) for key in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--output", default="", help="name of the results file, without extension")
    arguments = parser.parse_args()
    own = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")]),
        "KERAS_BACKEND": "kgraph",
    }
    onnx = environments.ROOT / "onnx" / "resnet50.onnx"
    peer = environments.ROOT / "peers" / "bin" / "python"
    with tempfile.TemporaryDirectory() as scratch:
        artifact, folder = Path(scratch) / "resnet50.kgraph", Path(scratch) / "c"
        run(sys.executable, SAVE, artifact, folder, environment=own)
        found: dict[str, list[dict]] = {"kgraph": []}
        if onnx.exists() and peer.exists():
            found["onnxruntime"] = []
        for _ in range(arguments.runs):
            found["kgraph"].append(json.loads(run(sys.executable, KGRAPH, artifact, environment=own)))
            if "onnxruntime" in found:
                clean = environments.clean_environment()
                found["onnxruntime"].append(json.loads(run(peer, ONNX_RUNTIME, onnx, environment=clean)))
        results: dict = {name: medians(runs) for name, runs in found.items()}
        results["kgraph"]["file MiB"] = artifact.stat().st_size / 2**20
        results["tiny_mlp from C, us a call"] = c_call(folder)
    for name, result in results.items():
        print(f"\n{name}" + ("" if isinstance(result, dict) else f": {result}"))
        for key, value in result.items() if isinstance(result, dict) else ():
            print(f"  {key:<24}{value:10.1f}" if "MiB" in key else f"  {key:<24}{value * 1e3:10.1f} ms")
    if arguments.output:
        path = ROOT / "benchmarks" / "results" / f"{arguments.output}.json"
        path.write_text(json.dumps({"machine": engines.machine(["kgraph"]), "results": results}, indent=1) + "\n")


def c_call(folder: Path) -> float | None:
    """Microseconds of a call of the exported `tiny_mlp` for one row, on one thread; the least of five runs."""
    if shutil.which("cc") is None:
        return None
    source = ROOT / "examples" / "embed" / "run.c"
    options = ["-O2", "-DMODEL=tiny_mlp", "-include", "tiny_mlp.h"]
    command = ["cc", *options, str(source), "libtiny_mlp.a", "-lm", "-lpthread", "-o", "run"]
    subprocess.run(command, cwd=folder, check=True)
    out = []
    for _ in range(5):
        text = subprocess.run(
            ["./run", "input", "output", "1", "200000"], cwd=folder, check=True, capture_output=True, text=True
        ).stdout
        out.append(float(text.split(":")[1].split()[0]))
    return min(out)


if __name__ == "__main__":
    main()
