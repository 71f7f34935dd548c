"""Cumulative kernels against NumPy and the primitives' samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kgraph import ops
from kgraph.codegen.cpu import cumulative
from kgraph.ir import PRIMITIVES, Dim, TensorType, Value, make_node
from tests.codegen.driver import run_node
from tests.codegen.samples import check_sample, compare

N, L = Dim.symbol("N"), Dim.symbol("L")
assert ops
NAMES = ["cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"]
SAMPLES = [(n, s) for n in NAMES for s in PRIMITIVES[n].samples()]


@pytest.mark.parametrize(("name", "sample"), SAMPLES, ids=lambda v: getattr(v, "name", v))
def test_samples(name, sample):
    tolerance = 2e-6 if PRIMITIVES[name].tolerance else None
    with np.errstate(all="ignore"):
        check_sample(cumulative, PRIMITIVES[name], sample, parts=2, tolerance=tolerance)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(NAMES),
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    axis=st.integers(0, 2),
    reverse=st.booleans(),
    dtype=st.sampled_from(["float32", "float64", "int32", "uint8", "int64"]),
    dynamic=st.booleans(),
    parts=st.integers(1, 3),
)
def test_any_axis(name, shape, axis, reverse, dtype, dynamic, parts):
    axis %= len(shape)
    if name == "cumlogsumexp" and not dtype.startswith("float"):
        return
    x = np.random.default_rng(0).integers(0, 4, shape).astype(dtype)
    if dtype.startswith("float"):
        x = x / x.dtype.type(4) + x.dtype.type(0.25)
    declared = tuple({0: N, len(shape) - 1: L}.get(k, n) for k, n in enumerate(shape)) if dynamic else x.shape
    node = make_node(PRIMITIVES[name], [Value(TensorType(declared, dtype))], {"axis": axis, "reverse": reverse})
    sizes = {"N": shape[0], "L": shape[-1]}
    (y,) = run_node(cumulative.lower, node, [x], sizes, parts)
    compare(y, PRIMITIVES[name].reference(x, axis=axis, reverse=reverse), 1e-6)
