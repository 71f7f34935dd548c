"""What the tests of backend functions share: data, and the check that a trace agrees with the eager call."""

from __future__ import annotations

import keras
import numpy as np

from kgraph.frontend.capture import capture_function
from kgraph.ir.interpreter import evaluate
from kgraph.ir.verifier import verify


def floats(*shape, seed=0, low=-3.0, high=3.0):
    return np.random.default_rng(seed).uniform(low, high, shape).astype("float32")


def both(function, *arrays, batched=True):
    """The eager result, after checking that a trace, with a symbolic first axis, gives the same."""
    eager = function(*arrays)
    captured = capture_function(function, *arrays, batch_symbol=batched)
    verify(captured.graph)
    results = evaluate(captured.graph, list(arrays), [v.value for v in captured.variables])
    for traced, concrete in zip(results, keras.tree.flatten(eager), strict=True):
        np.testing.assert_allclose(traced, concrete, rtol=1e-5, atol=1e-6)
        assert traced.dtype == concrete.dtype
    return eager


def to_first(x):
    """[N, *spatial, C] as [N, C, *spatial]."""
    return np.moveaxis(x, -1, 1)
