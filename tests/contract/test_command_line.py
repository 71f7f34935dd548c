"""The command line: what it prints for models of every form, and for what is no model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from shutil import which

import numpy as np
import pytest
from typer.testing import CliRunner

import kgraph
from kgraph.cli import application

MODELS = """
import keras
from keras import layers

def pair():
    a, b = keras.Input((4,), name="zeta"), keras.Input((3,), name="alpha")
    return keras.Model([a, b], layers.Dense(2)(layers.Concatenate()([a, b])))

def nested():
    a, b = keras.Input((4,), name="zeta"), keras.Input((None,), name="alpha")
    return keras.Model({"z": a, "a": b}, {"sum": keras.ops.sum(b, axis=1), "same": a})

def subclassed():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, x):
            return self.dense(x)

    model = Model()
    model(keras.ops.ones((2, 5)))
    return model

number = 5
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a command in a folder with MODELS in `own_models.py`; gives the exit code and the output."""
    (tmp_path / "own_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_models", raising=False)

    def command(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(application, list(arguments))
        return result.exit_code, result.output + str(result.exception or "")

    return command


@pytest.mark.parametrize("name", ["pair", "nested", "subclassed"])
def test_commands_take_models_of_every_form(run, name):
    for command in (["run"], ["compile"], ["explain", "--profile"], ["bench", "--seconds", "0.01"]):
        code, output = run(command[0], f"own_models:{name}", *command[1:])
        assert code == 0, output
    code, output = run("run", f"own_models:{name}", "--batch", "3", "--size", "6", "--output", "out.npz")
    assert code == 0, output
    assert "largest difference" in output
    assert np.load("out.npz")["arr_0"].shape[0] == 3


def test_inputs_of_a_file_go_by_name(run):
    np.savez("inputs.npz", alpha=np.ones((2, 3), "float32"), zeta=np.zeros((2, 4), "float32"))
    code, output = run("run", "own_models:pair", "--inputs", "inputs.npz")
    assert code == 0, output
    np.save("one.npy", np.ones((2, 3), "float32"))
    code, output = run("run", "own_models:pair", "--inputs", "one.npy")
    assert code == 2
    assert "zeta" in output


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("Nope", "keras.applications"),
        ("missing.keras", "missing.keras"),
        ("no_such_module:f", "no_such_module"),
        ("own_models:nothing", "nothing"),
        ("own_models:number", "no Keras model"),
    ],
)
def test_what_is_no_model_is_named(run, model, words):
    code, output = run("run", model)
    assert code == 2
    assert words in " ".join(output.split())


def test_export_writes_libraries(run):
    if which("cc") is None:
        pytest.skip("no C compiler")
    options = ["--name", "adder", "--level", "x86-64-v3", "--weights", "file"]
    code, output = run("export", "own_models:pair", "library", *options)
    assert code == 0, output
    for name in ("adder.h", "libadder.so", "libadder.a", "adder.c", "adder.weights"):
        assert (Path("library") / name).stat().st_size > 0
        assert name in output


def test_export_writes_onnx_files(run):
    onnx = pytest.importorskip("onnx")
    for target, written in (("models", "models"), ("pair.onnx", "pair.onnx")):
        code, output = run("export", "own_models:pair", target, "--format", "onnx", "--no-optimised")
        assert code == 0, output
        assert f"wrote {written}" in output
    assert [i.name for i in onnx.load("pair.onnx").graph.input] == ["zeta", "alpha"]
    assert len(list(Path("models").glob("*.onnx"))) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format", "tflite"], "expected c or onnx"),
        (["--format", "onnx", "--name", "x"], "takes no name"),
        (["--level", "x86-64-v9"], "x86-64-v9"),
        (["--weights", "nowhere"], "nowhere"),
    ],
)
def test_export_names_what_is_wrong(run, options, words):
    code, output = run("export", "own_models:pair", "out", *options)
    assert code == 2
    assert words in " ".join(output.replace("│", " ").split())


def test_missing_files_are_named(run):
    code, output = run("run", "own_models:pair", "--inputs", "absent.npy")
    assert code == 2
    assert "absent.npy" in output
    command = [sys.executable, "-m", "kgraph", "absent.py"]
    environment = {"PYTHONPATH": str(Path(kgraph.__file__).parents[1])}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 2
    assert result.stderr.strip() == "kgraph: no such file: absent.py"
