"""`vectorize`: a function of elements made to work on tensors."""

from __future__ import annotations

from collections.abc import Callable

from keras.src import tree
from keras.src.backend.common.backend_utils import vectorize_impl

from kgraph.frontend.keras_backend.numpy.common import Tensor, size_of
from kgraph.frontend.keras_backend.numpy.shape import stack


def _mapped(function: Callable, in_axes: tuple) -> Callable:
    """A function applied to the slices along the first axis of those arguments whose entry is 0, results stacked."""

    def wrapped(*args: Tensor) -> Tensor:
        length = next(size_of(arg.shape[0]) for arg, axis in zip(args, in_axes, strict=True) if axis is not None)
        results = [
            function(*(arg if axis is None else arg[i] for arg, axis in zip(args, in_axes, strict=True)))
            for i in range(length)
        ]
        return tree.map_structure(lambda *parts: stack(parts), *results)

    return wrapped


def vectorize(pyfunc: Callable, *, excluded: set | None = None, signature: str | None = None) -> Callable:
    """A function that applies `pyfunc` to every element (or core block, with a signature such as "(m,n)->(m)").

    Under trace it is unrolled, so the axes that it runs over cannot be symbolic.
    """
    return vectorize_impl(pyfunc, _mapped, excluded=excluded, signature=signature)
