"""`kgraph.compile` in a process whose Keras runs on another backend."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks import environments

ROOT = Path(__file__).resolve().parent.parent.parent

SCRIPT = """
import keras, numpy as np
import kgraph

class Scale(keras.layers.Layer):
    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1],), initializer="ones", name="w")

    def call(self, x):
        return x * self.w + 1

if __name__ == "__main__":
    assert keras.backend.backend() == "BACKEND"
    layers = keras.layers
    model = keras.Sequential([
        keras.Input((8, 8, 3)), layers.Conv2D(4, 3, activation="relu"), Scale(), layers.Flatten(), layers.Dense(3)
    ])
    compiled = kgraph.compile(model)
    assert "BACKEND" in repr(compiled)
    x = np.random.default_rng(0).random((5, 8, 8, 3)).astype("float32")

    def check(y):
        assert type(y) is np.ndarray
        np.testing.assert_allclose(y, model.predict(x, verbose=0), rtol=1e-5, atol=1e-5)

    check(compiled(x))
    check(compiled(keras.ops.convert_to_tensor(x)))
    check(compiled.predict(x, batch_size=2))
    model.set_weights([w * 1.5 for w in model.get_weights()])
    check(compiled(x))
    try:
        kgraph.compile(layers.Dense(3))
    except TypeError as error:
        assert "BACKEND" in str(error)
    else:
        raise AssertionError
    print("all good")
"""


@pytest.mark.parametrize("backend", ["jax", "torch", "tensorflow"])
def test_models_of_other_backends(backend, tmp_path):
    name = "jax" if backend == "jax" else "conformance"
    interpreter = environments.ROOT / name / "bin" / "python"
    if not interpreter.exists():
        pytest.skip(f"no environment with {backend}; python -m benchmarks.environments {name}")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("BACKEND", backend))
    environment = environments.clean_environment(
        KERAS_BACKEND=backend, PYTHONPATH=str(ROOT), KGRAPH_CACHE_DIR=str(tmp_path / "cache")
    )
    done = subprocess.run([interpreter, script], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all good" in done.stdout
