"""Runs a saved model as a service would, from the start of Python to the first result: `runtime_check.py m.kgraph`."""

import time

START = time.perf_counter()

import resource  # noqa: E402
import sys  # noqa: E402

import numpy as np  # noqa: E402

NUMPY = time.perf_counter()

import kgraph  # noqa: E402

load = kgraph.load
IMPORTED = time.perf_counter()


def main(path: str) -> None:
    data = np.load(path.replace(".kgraph", ".npz"))
    x, y = data["x"], data["y"]
    start = time.perf_counter()
    model = load(path)
    loaded = time.perf_counter()
    result = model(x)
    done = time.perf_counter()
    assert result.dtype == y.dtype
    assert result.tobytes() == y.tobytes()
    for name in ("keras", "llvmlite", "numba", "scipy", "ml_dtypes"):
        assert name not in sys.modules
    parts = {name: f"{seconds * 1e3:.1f}" for name, seconds in model.stats()["seconds"].items()}
    print(f"{path}: the same bits; {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB at most")
    print(f"  ms: numpy {(NUMPY - START) * 1e3:.1f}, kgraph {(IMPORTED - NUMPY) * 1e3:.1f}, load", end=" ")
    print(f"{(loaded - start) * 1e3:.1f} {parts}, first call {(done - loaded) * 1e3:.1f};", end=" ")
    print(f"CPU seconds in all {time.process_time():.2f}")


main(sys.argv[1])
