"""Every architecture of keras.applications against Keras on JAX: `python -m tests.oracle.applications [name ...]`.

Prints a line per model (errors of kgraph and of JAX against float64, compile and call time); fails if one falls short.
"""

from __future__ import annotations

import sys
import time

import keras
import numpy as np

import kgraph
from tests.oracle import comparison

sys.path.insert(0, str(comparison.ROOT / "benchmarks"))
sys.path.insert(0, str(comparison.ROOT / "tests" / "oracle"))
import jax_process


def names() -> list[str]:
    """All architectures of the installed Keras."""
    found = (n for n in dir(keras.applications) if n[0].isupper())
    return [n for n in found if callable(getattr(keras.applications, n))]


def main() -> int:
    failed = 0
    for name in sys.argv[1:] or names():
        comparison.ensure_outputs([name])
        keras.backend.clear_session()
        try:
            model, x = jax_process.built(name)
            start = time.perf_counter()
            compiled = kgraph.compile(model)
            compiled_in = time.perf_counter() - start
            y = compiled(x)
            start = time.perf_counter()
            compiled(x)
            milliseconds = (time.perf_counter() - start) * 1e3
            result = comparison.compare(name, [np.asarray(leaf) for leaf in keras.tree.flatten(y)])
            verdict = "ok" if result.passed else "FAILED"
            text = f"error {result.kgraph_error:.2e}, JAX {result.jax_error:.2e}, compile {compiled_in:.1f} s, "
            text += f"call {milliseconds:.1f} ms, host steps {compiled.stats()['host_steps']}"
        except Exception as error:
            verdict, text = "FAILED", f"{type(error).__name__}: {error}"
        failed += verdict != "ok"
        print(f"{name:20s} {verdict:6s} {text}", flush=True)
    print(f"{failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
