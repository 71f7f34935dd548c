"""The public functions: `compile` and `jit`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from kgraph.config import Options

TARGETS = ("cpu",)


def compile(model, *, target: str = "cpu", freeze: bool = False, example: Any = None, progress: bool | None = None):
    """Compile a Keras model's inference to native kernels.

    Args:
        model: a built Keras model or layer (Functional, Sequential, subclassed, nested). A subclassed model that has
            not been called yet needs `example`.
        target: "cpu".
        freeze: bake the weights in as they are now.
        example: inputs of one call, for models that do not state their input shapes.
        progress: show a progress bar for compiles over a second; by default only on a terminal.

    Gives a `CompiledModel`: call it like the model, with NumPy arrays.
    Raises UnsupportedError naming each operation without support and its layer, CaptureError where the model cannot
    be captured.
    """
    from kgraph.compiled import CompiledModel
    from kgraph.frontend.capture import capture

    _check_target(target)
    options = Options(target=target, freeze=freeze, progress=progress)
    name = getattr(model, "name", type(model).__name__)
    return CompiledModel(functools.partial(_capture_model, capture, model, example), options, name)


def _capture_model(capture, model, example, sizes: dict[str, int]):
    return capture(model, sizes=sizes, example=example)


def jit(function: Callable | None = None, *, target: str = "cpu", progress: bool | None = None):
    """Compile a function written in `keras.ops`, at its first call, for the ranks and dtypes that it is called with.

    Usable as a decorator. The first axis and all other sizes are fixed to those of the call; a call with other sizes
    compiles again. Gives NumPy arrays in the structure that the function returns.
    """
    from kgraph.compiled import CompiledFunction

    _check_target(target)
    if function is None:
        return functools.partial(jit, target=target, progress=progress)
    if not callable(function):
        raise TypeError(f"kgraph.jit takes a function written in keras.ops, got {function!r}")
    return CompiledFunction(function, Options(target=target, progress=progress))


def _check_target(target: str) -> None:
    if target not in TARGETS:
        raise ValueError(f"kgraph has no target {target!r}; targets: {', '.join(TARGETS)}")


__all__ = ["compile", "jit"]
