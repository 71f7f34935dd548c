"""The public functions: `compile` and `jit`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from kgraph.config import Options
from kgraph.errors import UnsupportedError
from kgraph.frontend.install import foreign_backend
from kgraph.precision import check_precision

TARGETS = ("cpu", "cuda", "cuda:N", "cuda-simulator")


def compile(
    model,
    *,
    target: str | None = None,
    freeze: bool = False,
    example: Any = None,
    progress: bool | None = None,
    precision: str = "float32",
    tune: bool = False,
):
    """Compile a Keras model's inference to native kernels.

    Args:
        model: a built Keras model or layer (Functional, Sequential, subclassed, nested). A subclassed model that has
            not been called yet needs `example`.
        target: "cpu", "cuda" (the GPU that `kgraph.set_device` names, else the first), "cuda:N", or "cuda-simulator":
            GPU kernels interpreted on the CPU by Numba, for tests. By default what `kgraph.set_device` was given.
        freeze: bake the weights in as they are now.
        example: inputs of one call, for models that do not state their input shapes.
        progress: show a progress bar for compiles over a second; by default only on a terminal.
        precision: "float32", or "bf16": float32 operands of products and convolutions are rounded to bfloat16 and their
            products summed in float32; everything else stays float32, attention and recurrent cells included.
            `precision_report` of the compiled model tells the error.
        tune: measure on this machine where there is a choice between algorithms, instead of estimating; takes up to a
            second per choice, once: the answers are kept in the cache. `KGRAPH_TUNE=1` does so everywhere.

    Gives a `CompiledModel`: call it like the model, with NumPy arrays. Where Keras runs on another backend in this
    process, a helper process compiles the model, and the result is a `kgraph.foreign.ForeignModel`.
    Raises UnsupportedError naming each operation without support and its layer, CaptureError where the model cannot
    be captured, TypeError for what is no model, DeviceError where the target is "cuda" and no GPU can be used,
    ValueError for an unknown target or precision.
    """
    _check_target(target)
    check_precision(precision)
    import keras

    if not isinstance(model, keras.Layer):
        hint = "; functions are compiled by kgraph.jit" if callable(model) and not isinstance(model, type) else ""
        raise TypeError(f"kgraph.compile takes a Keras model or layer, got {model!r}{hint}")
    backend = foreign_backend()
    if backend is not None:
        from kgraph.foreign import ForeignModel
        from kgraph.runtime.cuda.device import get_device

        if not isinstance(model, keras.Model):
            raise TypeError(f"with Keras on {backend}, kgraph.compile takes a keras.Model, got {model!r}")
        if (target or get_device()) != "cpu":
            raise UnsupportedError(
                f"with Keras on {backend}, kgraph.compile has the target 'cpu' alone, got {target!r}"
            )
        return ForeignModel(model, backend, freeze=freeze, example=example, precision=precision, tune=tune)
    from kgraph.compiled import CompiledModel
    from kgraph.frontend.capture import capture

    options = Options(target=target, freeze=freeze, progress=progress, precision=precision, tune=tune)
    functional = getattr(model, "_functional", None) or model
    return CompiledModel(
        functools.partial(_capture_model, capture, model, example),
        options,
        model.name,
        variables=lambda: model.variables,
        adapts_rank=hasattr(functional, "_inputs_struct") and example is None,
    )


def _capture_model(capture, model, example, sizes: dict[str, int]):
    return capture(model, sizes=sizes, example=example)


def jit(function: Callable | None = None, *, target: str | None = None, progress: bool | None = None):
    """Compile a function written in `keras.ops`, at its first call with each set of shapes, dtypes and other arguments.

    Usable as a decorator. Arguments that are no arrays (numbers, strings, None, hashable objects) count by value: a
    call with another one compiles again. The compiled function gives NumPy arrays in the structure that `function`
    gives. target, progress: as in `compile`.

    Raises TypeError for what is not callable, ValueError for an unknown target; calls raise what `compile` raises.
    """
    from kgraph.compiled import CompiledFunction

    _check_target(target)
    if function is None:
        return functools.partial(jit, target=target, progress=progress)
    if not callable(function):
        raise TypeError(f"kgraph.jit takes a function written in keras.ops, got {function!r}")
    return CompiledFunction(function, Options(target=target, progress=progress))


def _check_target(target: str | None) -> None:
    numbered = target is not None and target.startswith("cuda:") and target[5:].isdigit()
    if target is not None and target not in TARGETS and not numbered:
        raise ValueError(f"kgraph has no target {target!r}; targets: {', '.join(TARGETS)}")


__all__ = ["compile", "jit"]
