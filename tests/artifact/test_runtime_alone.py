"""Loading and running needs neither Keras nor the compiler: only NumPy and the modules of `kgraph-runtime`."""

from __future__ import annotations

import kgraph  # isort: skip  (before Keras)

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
import numpy as np
import kgraph
data = np.load(sys.argv[3])
loaded = kgraph.load(sys.argv[2])
assert loaded(data["x"]).tobytes() == data["y"].tobytes()
assert loaded.predict(data["x"], batch_size=1).shape == data["y"].shape
assert "native" in repr(loaded) and str(loaded.explain()) and str(loaded.profile(data["x"], repeats=1))
foreign = {name.partition(".")[0] for name, module in sys.modules.items() if getattr(module, "__file__", None)}
foreign -= set(sys.stdlib_module_names) | {"kgraph", "numpy", "__main__"}
print(json.dumps([sorted(foreign), sorted(name for name in sys.modules if name.startswith("kgraph."))]))
"""


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """Folders with what `kgraph-runtime` installs, and with NumPy and nothing else."""
    folder = tmp_path_factory.mktemp("alone")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(folder / "runtime")]
    subprocess.run(command, cwd=ROOT / "runtime", check=True, capture_output=True)
    (folder / "numpy").mkdir()
    site = Path(np.__file__).parents[1]
    for name in ("numpy", "numpy.libs"):
        if (site / name).exists():
            os.symlink(site / name, folder / "numpy" / name)
    return [str(folder / "runtime"), str(folder / "numpy")]


def run_alone(alone, path, x, y, tmp_path) -> list:
    np.savez(tmp_path / "data.npz", x=x, y=y)
    command = [sys.executable, "-I", "-S", "-c", RUN, json.dumps(alone), str(path), str(tmp_path / "data.npz")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["convolution", "recurrent", "attention"])
def test_small_models(name, saved, alone, tmp_path):
    compiled, x, path = saved(name)
    foreign, own = run_alone(alone, path, x, compiled(x), tmp_path)
    assert foreign == []
    assert not [m for m in own if m.split(".")[1] in ("frontend", "ir", "ops", "passes", "codegen", "artifact")]


def test_a_loaded_model_in_the_whole_package(saved):
    """Even where all is installed, loading imports none of it."""
    _, _, path = saved("dense")
    code = (
        "import sys, kgraph, numpy as np\n"
        f"kgraph.load({str(path)!r})(np.zeros((2, 12), 'float32'))\n"
        "others = ('keras', 'numba', 'llvmlite', 'scipy', 'rich', 'typer', 'ml_dtypes')\n"
        "names = {m for m in sys.modules if m.split('.')[0] in others}\n"
        "rooms = ('ir', 'ops', 'passes', 'codegen', 'artifact', 'frontend')\n"
        "names |= {m for m in sys.modules if m.startswith(tuple(f'kgraph.{room}' for room in rooms))}\n"
        "assert names <= {'kgraph.frontend', 'kgraph.frontend.install'}, names\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_what_is_not_there(saved, alone, tmp_path):
    _, _, path = saved("narrow")
    code = (
        "import json, sys\nsys.path[:0] = json.loads(sys.argv[1])\nimport kgraph\n"
        "for use in (lambda: kgraph.compile, lambda: kgraph.load(sys.argv[2])):\n"
        "    try:\n        use()\n    except Exception as error:\n        print(type(error).__name__, error)\n"
    )
    command = [sys.executable, "-I", "-S", "-c", code, json.dumps(alone), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert (
        lines[0]
        == "ImportError kgraph.compile needs the package kgraph; this is kgraph-runtime, which runs saved models"
    )
    assert "bfloat16 need the package ml_dtypes" in lines[1]


@pytest.mark.long
def test_resnet50(alone, tmp_path):
    keras.utils.set_random_seed(1)
    compiled = kgraph.compile(keras.applications.ResNet50(weights=None))
    compiled.save(tmp_path / "m.kgraph", levels="native", rebuildable=False)
    x = np.random.default_rng(0).random((1, 224, 224, 3), "float32")
    assert run_alone(alone, tmp_path / "m.kgraph", x, compiled(x), tmp_path)[0] == []
