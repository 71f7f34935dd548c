"""Makes Keras run on kgraph: an import finder that serves `frontend.keras_backend` as Keras' NumPy backend.

Keras picks its backend in a closed if/elif, so a new name cannot be added from outside. `install()` puts a finder in
front of `sys.meta_path`; when Keras asks for `keras.src.backend.numpy` (which in Keras itself imports JAX) it gets
kgraph's modules, and Keras' configuration module, which reads `KERAS_BACKEND` once, sees `numpy` while it runs.
`os.environ` itself keeps `KERAS_BACKEND=kgraph`, so that child processes start the same way.

This module is imported at interpreter start-up by `kgraph_hook.pth`, so it imports nothing but the
standard library, and of that not `importlib.abc`, whose base classes cost more time than all of kgraph's runtime.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import sys
import warnings

SERVED = "keras.src.backend.numpy"
CONFIG = "keras.src.backend.config"
PACKAGE = "kgraph.frontend.keras_backend"
# `keras.src.backend.numpy` itself is the module that gathers the interface; its submodules map one to one.
INTERFACE = f"{PACKAGE}.interface"
# Modules of Keras and KerasHub above the backend in which `keras_backend.coarse` replaces functions.
COARSE = frozenset(
    {
        "keras.src.ops.operation",
        "keras.src.ops.nn",
        "keras.src.layers.layer",
        "keras.src.layers.normalization.group_normalization",
        "keras.src.layers.attention.multi_head_attention",
        "keras.src.layers.attention.grouped_query_attention",
        "keras.src.layers.core.embedding",
        "keras.src.layers.preprocessing.image_preprocessing.equalization",
        "keras_hub.src.models.depth_anything.interpolate",
        "keras_hub.src.models.roformer_v2.roformer_v2_attention",
    }
)
# KerasHub's, in which `keras_backend.generation` does.
_TASKS = ("causal_lm", "image_to_image", "inpaint", "text_to_image")
GENERATING = frozenset(f"keras_hub.src.models.{task}" for task in _TASKS)
# KerasHub's, in which `keras_backend.transformers_export` does.
EXPORTING = frozenset({"keras_hub.src.utils.transformers.export.hf_exporter"})
_REPLACING = {
    **dict.fromkeys(COARSE, "coarse"),
    **dict.fromkeys(GENERATING, "generation"),
    **dict.fromkeys(EXPORTING, "transformers_export"),
}


class _AliasLoader:
    """Serves a kgraph module under one of Keras' names: one module object, two entries in `sys.modules`."""

    def __init__(self, target: str):
        self.target = target

    def create_module(self, spec):
        module = importlib.import_module(self.target)
        self.own_spec = module.__spec__
        return module

    def exec_module(self, module):
        # The import machinery has replaced `__spec__`; the module keeps the identity under which it was made.
        module.__spec__ = self.own_spec


class _WrappingLoader:
    """Another loader with something done around the execution of the module."""

    def __init__(self, loader):
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def __getattr__(self, name):
        return getattr(self.loader, name)


class _ReplacingLoader(_WrappingLoader):
    """Hands a module to one of `keras_backend`, which replaces functions in it, once it is loaded."""

    def exec_module(self, module):
        self.loader.exec_module(module)
        if foreign_backend() is None:  # KerasHub may be imported on another backend
            who = importlib.import_module(f"{PACKAGE}.{_REPLACING[module.__name__]}")
            who.apply(module.__name__, module)


class _ConfigLoader(_WrappingLoader):
    """Runs Keras' configuration module with `KERAS_BACKEND=numpy` in the environment, and restores it after."""

    def exec_module(self, module):
        before = os.environ.get("KERAS_BACKEND")
        os.environ["KERAS_BACKEND"] = "numpy"
        try:
            self.loader.exec_module(module)
        finally:
            if before is None:
                del os.environ["KERAS_BACKEND"]
            else:
                os.environ["KERAS_BACKEND"] = before


class KerasBackendFinder:
    """Answers for `keras.src.backend.numpy`, its submodules, Keras' configuration module, and those of `_REPLACING`."""

    def find_spec(self, fullname, path=None, target=None):
        if not fullname.startswith(("keras.src.", "keras_hub.src.")):
            return None
        if fullname == SERVED:
            return importlib.machinery.ModuleSpec(fullname, _AliasLoader(INTERFACE), is_package=True)
        if fullname.startswith(SERVED + "."):
            own = PACKAGE + fullname[len(SERVED) :]
            return importlib.machinery.ModuleSpec(fullname, _AliasLoader(own))
        wrapper = _ConfigLoader if fullname == CONFIG else _ReplacingLoader if fullname in _REPLACING else None
        if wrapper is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = wrapper(spec.loader)
        return spec


def foreign_backend() -> str | None:
    """The backend that Keras runs on if it is already imported and is not kgraph, else None.

    Where this names a backend, models of this process hold that backend's tensors, and `kgraph.compile` hands them to
    a helper process.
    """
    config = sys.modules.get(CONFIG)
    if config is None or not hasattr(config, "_BACKEND"):
        return None
    served = sys.modules.get(SERVED)
    if served is not None and getattr(served, "__name__", "") == INTERFACE:
        return None
    if served is None and config._BACKEND == "numpy" and is_installed():
        return None  # Keras' import is under way
    return config._BACKEND


def is_installed() -> bool:
    """Whether the finder is in place."""
    return any(isinstance(finder, KerasBackendFinder) for finder in sys.meta_path)


def install(force: bool = True) -> bool:
    """Make Keras run on kgraph in this process; gives whether it does.

    force: also where the environment names another backend. `import kgraph` passes False, so that
        `KERAS_BACKEND=jax` stays what the user said.

    If Keras is already imported with another backend nothing changes, a warning says so (with `force`) and the result
    is False.
    """
    if is_installed() and foreign_backend() is None:
        return True
    wanted = os.environ.get("KERAS_BACKEND", "")
    if not force and wanted not in ("", "kgraph"):
        return False
    other = foreign_backend()
    if other is not None:
        if force:
            warnings.warn(
                f"Keras is already imported with the {other!r} backend, so kgraph cannot become its backend in this "
                "process. Import kgraph before keras, or start with KERAS_BACKEND=kgraph.",
                RuntimeWarning,
                stacklevel=2,
            )
        return False
    os.environ["KERAS_BACKEND"] = "kgraph"
    sys.meta_path.insert(0, KerasBackendFinder())
    return True
