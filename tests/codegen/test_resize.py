"""Resize kernels against the reference."""

from __future__ import annotations

import numpy as np
import pytest

from kgraph import ops
from kgraph.codegen.cpu import resize
from kgraph.ir import Dim, TensorType, Value, make_node
from kgraph.ops.resize import RESIZE
from tests.codegen.driver import run_node
from tests.codegen.samples import check_sample, compare

N = Dim.symbol("N")
assert ops


@pytest.mark.parametrize("sample", RESIZE.samples(), ids=lambda s: s.name)
@pytest.mark.parametrize("parts", [1, 2])
def test_samples(sample, parts):
    check_sample(resize, RESIZE, sample, parts)


@pytest.mark.parametrize("method", ["nearest", "bilinear", "bicubic", "lanczos3", "lanczos5", "area"])
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 20])
def test_methods_with_symbolic_batch(method, antialias, channels):
    x = np.random.default_rng(0).random((2, 23, 9, channels), np.float32)
    attrs = {"size": (5, 31), "method": method, "antialias": antialias}
    node = make_node(RESIZE, [Value(TensorType((N, 23, 9, channels), "float32"))], attrs)
    (y,) = run_node(resize.lower, node, [x], {"N": 2}, 3)
    compare(y, RESIZE.reference(x.astype(np.float64), **attrs), 1e-5)


@pytest.mark.parametrize("size", [(3, 9, 7), (5, 4, 6), (5, 9, 6), (8, 4, 12)])
@pytest.mark.parametrize("method", ["bilinear", "nearest"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_volumes_and_dtypes(size, method, dtype):
    x = np.random.default_rng(0).random((2, 5, 4, 6, 3)).astype(TensorType((), dtype).np_dtype)
    attrs = {"size": size, "method": method, "antialias": True}
    node = make_node(RESIZE, [Value(TensorType(x.shape, dtype))], attrs)
    (y,) = run_node(resize.lower, node, [x], parts=2)
    compare(y, RESIZE.reference(x, **attrs), 1e-6)


def test_refuses_symbolic_images():
    node = make_node(RESIZE, [Value(TensorType((2, N, 9, 3), "float32"))],
                     {"size": (4, 4), "method": "bilinear", "antialias": False})  # fmt: skip
    assert resize.accepts(node) == "symbolic image sizes"
