"""Primitives that run on NumPy between kernels: the reference of a primitive as a plan calls it."""

from __future__ import annotations

import numpy as np

from kgraph.ir import Dim, Primitive
from kgraph.ir.dims import evaluate


class HostFunction:
    """A primitive's reference with its attributes: called with arrays and the values of the symbolic sizes."""

    __slots__ = ("attrs", "primitive")

    def __init__(self, primitive: Primitive, attrs: dict):
        self.primitive, self.attrs = primitive, attrs

    def __call__(self, arrays: list[np.ndarray], sizes: dict[str, int]) -> tuple:
        attrs = {name: _concrete(value, sizes) for name, value in self.attrs.items()}
        results = self.primitive.reference(*arrays, **attrs)
        return results if isinstance(results, tuple) else (results,)


def _concrete(value, sizes: dict[str, int]):
    if isinstance(value, Dim):
        return evaluate(value, sizes)
    if type(value) is tuple:
        return tuple(_concrete(v, sizes) for v in value)
    return value
