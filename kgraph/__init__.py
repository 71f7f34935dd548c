"""kgraph: a graph compiler that lowers Keras models to native kernels.

Importing kgraph before Keras makes it Keras' backend, unless `KERAS_BACKEND` names another one. The public names load
what they need at first use: importing the package itself costs nothing, and `kgraph.runtime` needs no Keras.
"""

from __future__ import annotations

import importlib
from typing import Any

from kgraph.frontend.install import install as _install

__version__ = "0.1.0"

# Public name -> the module that defines it.
_EXPORTS = {
    "CompiledModel": "kgraph.compiled",
    "LoadedModel": "kgraph.runtime.artifact",
    "compile": "kgraph.api",
    "errors": "kgraph.errors",
    "get_num_threads": "kgraph.runtime.threads",
    "grad": "kgraph.gradients",
    "jit": "kgraph.api",
    "load": "kgraph.loading",
    "set_num_threads": "kgraph.runtime.threads",
    "value_and_grad": "kgraph.gradients",
}

__all__ = ["__version__", *_EXPORTS]

_install(force=False)


def __getattr__(name: str) -> Any:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module 'kgraph' has no attribute {name!r}")
    loaded = importlib.import_module(module)
    value = loaded if module == f"kgraph.{name}" else getattr(loaded, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
