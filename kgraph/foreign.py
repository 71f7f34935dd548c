"""Models of a process in which Keras runs on another backend: compiled by a helper process, called in this one.

The model goes to the helper as a `.keras` file. There Keras runs on kgraph; the helper compiles and saves an artifact,
which is loaded here. The two share nothing, so that neither backend's state is touched.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from kgraph.errors import CaptureError
from kgraph.loading import load

_LARGEST_MESSAGE = 4000


class ForeignModel:
    """A Keras model on another backend, compiled by kgraph. Takes that backend's tensors or NumPy arrays, gives NumPy.

    The weights are compared with those that were compiled before each call, unless the model was compiled with
    `freeze=True`: where they have changed, the model is compiled again.
    """

    def __init__(self, model, backend: str, *, freeze: bool, example: Any, **options: Any):
        self.name, self.backend = model.name, backend
        self._model, self._frozen, self._example, self._options = model, freeze, example, options
        self._compile()

    def _compile(self) -> None:
        self._seen = None if self._frozen else _weights(self._model)
        self._loaded = _compile_in_helper(self._model, self._example, self._options)

    def _current(self):
        if self._seen is not None:
            now = _weights(self._model)
            if any(not np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in zip(now, self._seen)):
                self._compile()
        return self._loaded

    def __call__(self, *args, **kwargs):
        """The outputs, as NumPy arrays in the structure that the model gives."""
        import keras

        args, kwargs = keras.tree.map_structure(_to_numpy, (args, kwargs))
        return self._current()(*args, **kwargs)

    def __getattr__(self, name: str):
        # What else a loaded model can do: predict, profile, explain, stats, graph.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._current(), name)

    def __repr__(self):
        return f"<kgraph.ForeignModel {self.name!r} of the {self.backend} backend>"


def _weights(model) -> list[np.ndarray]:
    return [np.array(w) for w in model.get_weights()]


def _to_numpy(x):
    from keras import ops

    if isinstance(x, np.ndarray) or not ops.is_tensor(x):
        return x
    return ops.convert_to_numpy(x)


def _compile_in_helper(model, example, options: dict[str, Any]):
    """The loaded artifact. Raises CaptureError with the helper's own words where it fails."""
    with tempfile.TemporaryDirectory(prefix="kgraph-") as folder:
        path = Path(folder)
        model.save(path / "model.keras")
        paths = [p for p in sys.path if p]
        request = {"modules": _modules(model), "main": _main_file(model), "path": paths, "options": options}
        if example is not None:
            np.savez(path / "example.npz", *_example_leaves(example))
        (path / "request.json").write_text(json.dumps(request))
        environment = {k: v for k, v in os.environ.items() if not k.startswith("KERAS_")}
        environment["KERAS_BACKEND"] = "kgraph"
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        done = subprocess.run(
            [sys.executable, "-m", "kgraph.foreign_compile", str(path)], capture_output=True, text=True, env=environment
        )
        if done.returncode:
            words = done.stderr.strip()[-_LARGEST_MESSAGE:]
            raise CaptureError(f"{model.name}: a process with Keras on kgraph could not compile it:\n{words}")
        # The file is mapped: what is mapped stays after its name is gone.
        return load(path / "model.kgraph", check_weights=False, self_test=False)


def _example_leaves(example) -> list[np.ndarray]:
    import keras

    return [np.asarray(_to_numpy(leaf)) for leaf in keras.tree.flatten(example)]


def _custom_classes(model) -> set[type]:
    """The classes of the model and its layers that are not Keras' own."""
    layers = [model, *model._flatten_layers()]
    return {cls for layer in layers for cls in type(layer).__mro__ if not _is_library(cls.__module__)}


def _is_library(module: str) -> bool:
    return module.partition(".")[0] in ("keras", "builtins", "torch", "tensorflow", "jax", "flax", "abc", "typing")


def _modules(model) -> list[str]:
    return sorted({cls.__module__ for cls in _custom_classes(model)} - {"__main__"})


def _main_file(model) -> str | None:
    """The script that defines classes of the model, to be imported as multiprocessing does, under another name."""
    if all(cls.__module__ != "__main__" for cls in _custom_classes(model)):
        return None
    file = getattr(sys.modules["__main__"], "__file__", None)
    if file is None:
        raise CaptureError(
            f"{model.name} has layers that are defined interactively; put them into a module, so that another process "
            "can import them"
        )
    return os.path.abspath(file)


__all__ = ["ForeignModel"]
