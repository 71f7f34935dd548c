"""Collects every unsupported operation of a capture, so that the error names all of them at once.

A layer whose call raises UnsupportedError gets stand-ins for its outputs, of the types that its own shape inference
gives, and the capture goes on to the next one. Nothing of such a graph is used but the list of what was missing.
"""

from __future__ import annotations

import contextvars
import functools

import numpy as np

from kgraph.errors import UnsupportedError
from kgraph.frontend.traced_array import TracedArray
from kgraph.ir import Dim, TensorType

_current: contextvars.ContextVar[Collector | None] = contextvars.ContextVar("kgraph_unsupported", default=None)


class Collector:
    """What one capture found unsupported: `found` maps a layer's path to the messages."""

    def __init__(self, tracer):
        self.tracer = tracer
        self.found: dict[str, list[str]] = {}

    def __enter__(self) -> Collector:
        self._token = _current.set(self)
        return self

    def __exit__(self, *exception) -> None:
        _current.reset(self._token)

    def stand_in(self, layer, error: UnsupportedError, args: tuple, kwargs: dict):
        """Note the error, and give inputs of the types that the layer's outputs would have."""
        import keras

        self.found.setdefault(layer.path or layer.name, []).append(str(error))

        def symbolic(x):
            if isinstance(x, (TracedArray, np.ndarray)):
                return keras.KerasTensor([None if isinstance(d, Dim) else d for d in x.shape], x.dtype)
            return x

        def enter(spec):
            if not isinstance(spec, keras.KerasTensor):
                return spec
            shape = tuple(Dim.symbol("unknown") if d is None else d for d in spec.shape)
            return self.tracer.add_input(TensorType(shape, spec.dtype), "unsupported")

        args, kwargs = keras.tree.map_structure(symbolic, (args, kwargs))
        return keras.tree.map_structure(enter, layer.compute_output_spec(*args, **kwargs))

    def error(self, name: str) -> UnsupportedError:
        """The error that lists what was found."""
        places = [f"layer {path!r}: {message}" for path, messages in self.found.items() for message in messages]
        if len(places) == 1:
            return UnsupportedError(f"{name!r} cannot be captured: {places[0]}")
        return UnsupportedError(f"{name!r} cannot be captured, for {len(places)} reasons:\n- " + "\n- ".join(places))


def collecting(call):
    """Keras' `Operation.__call__` that reports to the running capture, if there is one."""

    @functools.wraps(call)
    def operation_call(self, *args, **kwargs):
        try:
            return call(self, *args, **kwargs)
        except UnsupportedError as error:
            collector = _current.get()
            if collector is None or not hasattr(self, "compute_output_shape"):
                raise
            try:
                return collector.stand_in(self, error, args, kwargs)
            except Exception:
                raise error from None

    return operation_call
