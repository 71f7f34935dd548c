"""`EagerArray`: NumPy's array where the tensors of Keras behave otherwise."""

from __future__ import annotations

import operator
from contextvars import ContextVar
from typing import Any

import numpy as np

from kgraph.frontend.indexing import get_item
from kgraph.frontend.traced_array import UFUNC_OPERATORS, TracedArray, functions
from kgraph.ir import Dim, np_dtype
from kgraph.ir.primitive import current_tracer

# Whether the code that runs is that of a layer's `call`.
inside_layer: ContextVar[bool] = ContextVar("inside_layer", default=False)

NARROW = frozenset(map(np_dtype, ("bfloat16", "float8_e4m3fn", "float8_e5m2")))


class EagerArray(np.ndarray):
    """An array with values that keeps to the rules of Keras' tensors.

    - `x += y` gives a new array: it shares its memory with the one that a layer was called with.
    - `x[i]` is recorded where `i` is traced or symbolic.
    - Operators on bfloat16 and float8 follow Keras' promotion; NumPy's would give float32 for `x * 0.5`.

    Layers get their arguments in this form, and results of primitives and ufuncs have it within a layer's call, while a
    trace runs, and wherever they are narrow (`presented`). Views are of this kind.
    """

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **kwargs):
        inputs = tuple(_plain(x) for x in inputs)
        if out is not None:
            kwargs["out"] = tuple(_plain(x) for x in out)
        elif method == "__call__" and not kwargs and any(getattr(x, "dtype", None) in NARROW for x in inputs):
            function = UFUNC_OPERATORS.get(ufunc.__name__)
            if function is not None:
                return getattr(functions(), function)(*inputs)
        return presented(getattr(ufunc, method)(*inputs, **kwargs))

    def __getitem__(self, key) -> Any:
        items = key if isinstance(key, tuple) else (key,)
        if any(map(_is_symbolic, items)):
            return get_item(_plain(self), key)
        return super().__getitem__(key)


def _is_symbolic(item) -> bool:
    if isinstance(item, slice):
        return any(isinstance(x, (TracedArray, Dim)) for x in (item.start, item.stop, item.step))
    return isinstance(item, (TracedArray, Dim))


def _plain(x):
    x = underlying(x)
    return x.view(np.ndarray) if isinstance(x, EagerArray) else x


def _not_in_place(function):
    return lambda self, other: function(self, other)


for _name in "add sub mul matmul truediv floordiv mod pow lshift rshift and or xor".split():
    _function = getattr(operator, _name, None) or getattr(operator, f"{_name}_")
    setattr(EagerArray, f"__i{_name}__", _not_in_place(_function))


def is_presented(array: np.ndarray) -> bool:
    """Whether an array that Keras' code computes with is to keep to its rules."""
    return array.dtype in NARROW or inside_layer.get() or current_tracer.get() is not None


def presented(x):
    """What a primitive or ufunc has computed, in the form in which Keras' code gets it."""
    return x.view(EagerArray) if type(x) is np.ndarray and is_presented(x) else x


def underlying(x):
    """The plain array that `presented` has made a view of; anything else as it is."""
    return x.base if type(x) is EagerArray and type(x.base) is np.ndarray else x
