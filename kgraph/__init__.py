"""kgraph: a graph compiler that lowers Keras models to native kernels.

Importing kgraph before Keras makes it Keras' backend, unless `KERAS_BACKEND` names another one. The public names load
what they need at first use: importing the package itself costs nothing, and `kgraph.runtime` needs no Keras.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> the module that defines it.
_EXPORTS = {
    "CompiledModel": "kgraph.compiled",
    "DeviceArray": "kgraph.runtime.cuda.device_array",
    "LoadedModel": "kgraph.runtime.artifact",
    "LoadedStep": "kgraph.runtime.artifact_step",
    "SparseTensor": "kgraph.frontend.keras_backend.sparse",
    "TrainingStep": "kgraph.training",
    "compile": "kgraph.api",
    "compile_step": "kgraph.training",
    "errors": "kgraph.errors",
    "get_device": "kgraph.runtime.cuda.device",
    "get_num_threads": "kgraph.runtime.threads",
    "grad": "kgraph.gradients",
    "jit": "kgraph.api",
    "load": "kgraph.loading",
    "set_device": "kgraph.runtime.cuda.device",
    "set_num_threads": "kgraph.runtime.threads",
    "value_and_grad": "kgraph.gradients",
}

__all__ = ["__version__", *_EXPORTS]

try:
    from kgraph.frontend.install import install as _install
except ModuleNotFoundError:
    pass  # the runtime alone, which has no part in Keras
else:
    _install(force=False)


def __getattr__(name: str) -> Any:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module 'kgraph' has no attribute {name!r}")
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise ImportError(
            f"kgraph.{name} needs the package kgraph; this is kgraph-runtime, which runs saved models"
        ) from None
    value = loaded if module == f"kgraph.{name}" else getattr(loaded, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
