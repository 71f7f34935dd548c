"""The peers' environments: virtual environments of their own below `.bench/`, never a dependency of kgraph."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent / ".bench"
_KGRAPH = ["scipy", "llvmlite", "networkx", "safetensors", "platformdirs", "filelock", "typer", "rich"]
PACKAGES = {
    # With what kgraph needs, so that models of a process with Keras on JAX can be compiled there.
    "jax": ["keras==3.15.1", "jax", *_KGRAPH],
    "peers": ["keras==3.15.1", "jax", "onnxruntime", "openvino", "onnx", "scipy"],
    "export": ["keras==3.15.1", "tensorflow-cpu", "tf2onnx", "onnx"],
    "export-torch": ["keras==3.15.1", "torch==2.13.0", "onnx", "onnxscript"],
    # Keras' own tests on kgraph and on JAX (`tests.conformance`): both with all that the tests import, and what kgraph
    # needs.
    "conformance": [
        *["keras==3.15.1", "jax", "tensorflow-cpu", "torch==2.13.0", "tensorboard", "orbax-checkpoint", "grain"],
        *["onnx", "onnxruntime"],
        *["pandas", "scikit-learn", "pillow", "pydot", "requests", "pytest", *_KGRAPH],
    ],
    # KerasHub's models, for `benchmarks.generate`.
    "generate": [
        *["keras==3.15.1", "jax", "sentencepiece", "tokenizers", "regex", "kagglehub", "absl-py", "packaging"],
        *_KGRAPH,
    ],
    # KerasHub's tests, from a checkout: preprocessing runs on TensorFlow, whatever the backend.
    "keras-hub": [
        *["keras==3.15.1", "jax", "tensorflow-cpu==2.21.0", "sentencepiece<0.2.2", "tokenizers", "regex", "dm-tree"],
        *["kagglehub", "absl-py", "packaging", "rouge-score", "pillow", "pytest", *_KGRAPH],
    ],
}
# What names a package that another one stands in for, TensorFlow by its build for processors, or that is not needed.
WITHOUT_DEPENDENCIES = {"keras-hub": ["tensorflow-text==2.21.1"], "generate": ["keras-hub==0.32.0"]}


def python(name: str) -> Path:
    """The interpreter of environment `name`; it is made on first use."""
    path = ROOT / name / "bin" / "python"
    if not path.exists():
        print(f"making the environment {name}: {' '.join(PACKAGES[name])}", file=sys.stderr)
        venv.create(ROOT / name, with_pip=True)
        try:
            install = [path, "-m", "pip", "install", "-q"]
            subprocess.run([*install, *PACKAGES[name]], check=True)
            if name in WITHOUT_DEPENDENCIES:
                subprocess.run([*install, "--no-deps", *WITHOUT_DEPENDENCIES[name]], check=True)
        except BaseException:
            shutil.rmtree(ROOT / name)  # half an environment would count as made
            raise
    return path


def clean_environment(**extra: str) -> dict[str, str]:
    """The environment of a peer's process: nothing of this one's Python settings."""
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "KERAS_", "KGRAPH_", "VIRTUAL_ENV"))
    }
    environment.update(TF_CPP_MIN_LOG_LEVEL="3", **extra)
    return environment


def onnx_folder(names: Iterable[str]) -> Path:
    """The folder of exported models; missing ones are exported.

    By Keras on TensorFlow first, by Keras on PyTorch where that fails, and by kgraph where both fail.
    """
    folder = ROOT / "onnx"
    script = Path(__file__).resolve().parent / "export_onnx.py"
    missing = [name for name in names if not (folder / f"{name}.onnx").exists()]
    for name, backend in (("export", "tensorflow"), ("export-torch", "torch")):
        if missing:
            environment = clean_environment(KERAS_BACKEND=backend)
            subprocess.run([python(name), script, folder, *missing], env=environment, check=False)
            missing = [m for m in missing if not (folder / f"{m}.onnx").exists()]
    if missing:
        environment = dict(os.environ, KERAS_BACKEND="kgraph", PYTHONPATH=str(ROOT.parent))
        subprocess.run([sys.executable, script, folder, *missing], env=environment, check=False)
    return folder


if __name__ == "__main__":
    for wanted in sys.argv[1:] or list(PACKAGES):
        print(python(wanted))
