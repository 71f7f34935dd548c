"""`kgraph compile -o`, `kgraph inspect`, and the commands that take saved models."""

from __future__ import annotations

import kgraph  # isort: skip  (before Keras)

import numpy as np
import pytest
from typer.testing import CliRunner

from kgraph.cli import application, main

MODEL = """
import keras
from keras import layers

def model():
    a, b = keras.Input((4,), name="zeta"), keras.Input((None,), name="alpha")
    return keras.Model({"z": a, "a": b}, {"sum": keras.ops.sum(b, axis=1), "dense": layers.Dense(3)(a)})
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a command in a folder with MODEL in `saved_models.py`; gives the exit code and the output."""
    (tmp_path / "saved_models.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def invoke(*arguments):
        result = CliRunner().invoke(application, list(arguments))
        return result.exit_code, result.output

    return invoke


def test_compile_inspect_run(run, tmp_path):
    code, output = run("compile", "saved_models:model", "-o", "m.kgraph", "--level", "native", "--no-graph")
    assert code == 0, output
    assert "saved m.kgraph" in output
    code, output = run("inspect", "m.kgraph")
    assert code == 0, output
    for part in (
        "all checksums hold",
        "input 'zeta': f32[N,4]",
        "output",
        "level native",
        "runs here",
        "code/0/native",
    ):
        assert part in output
    assert "the graph is not stored" in output
    assert "checksums" not in run("inspect", "m.kgraph", "--no-check")[1].splitlines()[0]
    np.savez("x.npz", zeta=np.ones((2, 4), "float32"), alpha=np.ones((2, 5), "float32"))
    code, output = run("run", "m.kgraph", "--inputs", "x.npz", "--output", "y.npz")
    assert code == 0, output
    assert "largest difference" not in output
    results = np.load("y.npz")
    loaded = kgraph.load("m.kgraph")({"z": np.ones((2, 4), "float32"), "a": np.ones((2, 5), "float32")})
    np.testing.assert_array_equal(results["arr_0"], loaded["dense"])
    np.testing.assert_array_equal(results["arr_1"], [5, 5])
    assert run("explain", "m.kgraph", "--profile")[0] == 0
    assert "median" in run("bench", "m.kgraph", "--seconds", "0.1")[1]


def test_wrong_files(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.kgraph").write_bytes(b"nothing" * 20)
    assert run("inspect", "none.kgraph")[0] == 2
    assert "no such file" in run("run", "none.kgraph")[1]
    monkeypatch.setattr("sys.argv", ["kgraph", "inspect", "bad.kgraph"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert "error: bad.kgraph: it is no model saved by kgraph" in capsys.readouterr().err
