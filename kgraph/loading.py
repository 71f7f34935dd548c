"""`kgraph.load`: a saved model, by the runtime alone where the file has code for this machine."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from types import ModuleType

from kgraph.errors import ArtifactError
from kgraph.runtime.artifact import Clock, LevelError, LoadedModel, open_file, open_model
from kgraph.runtime.artifact_step import LoadedStep

# What a small install lacks; a module that is missing inside of these is a fault of the install and shows as such.
_OPTIONAL = ("kgraph.artifact", "kgraph.ops", "kgraph.codegen", "llvmlite", "ml_dtypes", "scipy")


def load(
    path: str | os.PathLike, *, check_weights: bool = True, self_test: bool = True, level: str | None = None
) -> LoadedModel | LoadedStep:
    """Load what `CompiledModel.save` or `TrainingStep.save` wrote; Keras and the compiler are not needed.

    Args:
        path: the file. It is mapped, and processes that load the same file share its weights in memory.
        check_weights: compare the checksums of the weights, for which they are read now; else they are read from the
            disk when a call first uses them. Everything else is always checked.
        self_test: repeat the call that was recorded when the model was saved, and compare the results.
        level: which of the stored object code to use (see `kgraph inspect`); by default the best that runs here.

    Gives a `LoadedModel`, called like the compiled model that was saved, or a `LoadedStep`. Where the machine runs none
    of the stored code, the model is compiled again from the graph in the file, if the compiler is installed.
    Raises ArtifactError for a file that is damaged, of a newer format, or that cannot be used on this machine, and
    DTypeError where its arrays need ml_dtypes and that is not installed.
    """
    clock = Clock()
    file, manifest = open_file(path)
    try:
        model = open_model(
            file, manifest, _host_function, clock, check_weights=check_weights, self_test=self_test, level=level
        )
    except LevelError as error:
        if level is not None:
            raise
        rebuild = _optional("kgraph.artifact.rebuild", f"{error}. To compile it for this machine, install kgraph")
        model = rebuild.rebuild(file, manifest, clock)
    return model if manifest.kind == "model" else LoadedStep(model, file)


def _host_function(text: str) -> Callable:
    why = "the model has steps that run on NumPy, for which the runtime alone does not suffice: install kgraph"
    return _optional("kgraph.artifact.host_steps", why).function_of(text)


def _optional(name: str, otherwise: str) -> ModuleType:
    """A module of the whole package. Raises ArtifactError with `otherwise` where that is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith(_OPTIONAL):
            raise
        raise ArtifactError(f"{otherwise} (there is no {error.name})") from error
