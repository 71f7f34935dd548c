"""Runs a kernel family on the samples of primitives, and compares with their references."""

from __future__ import annotations

import numpy as np

from kgraph.ir import Value, make_node, type_of
from tests.codegen.driver import run_node


def make(primitive, sample):
    """A node of the sample's operands."""
    values = [Value(type_of(a), name=f"x{k}") for k, a in enumerate(sample.args)]
    return make_node(primitive, values, sample.attrs)


def check_sample(family, primitive, sample, parts: int = 1, tolerance: float | None = None) -> None:
    """The family's kernel gives what the reference gives, within the primitive's tolerance."""
    node = make(primitive, sample)
    reason = family.accepts(node)
    assert reason is None, reason
    results = run_node(family.lower, node, list(sample.args), parts=parts)
    expected = primitive.reference(*sample.args, **sample.attrs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for result, wanted in zip(results, expected, strict=True):
        assert result.shape == wanted.shape
        compare(result, wanted, primitive.tolerance if tolerance is None else tolerance)


def compare(result, wanted, tolerance: float) -> None:
    """Equal up to `tolerance` of the largest magnitude; exactly for tolerance 0 and for ints."""
    if result.dtype.name == "bfloat16" and not tolerance:  # NumPy's comparison does not know its NaN
        result, wanted = result.astype(np.float32), wanted.astype(np.float32)
    if not tolerance or result.dtype.kind not in "fV":
        np.testing.assert_array_equal(result, wanted)
        return
    low = {"float16": 1e-3, "bfloat16": 8e-3}.get(result.dtype.name, 0.0)
    result, wanted = result.astype(np.float64), wanted.astype(np.float64)
    finite = np.isfinite(wanted)
    scale = np.abs(wanted[finite]).max(initial=1e-30)
    np.testing.assert_allclose(result, wanted, rtol=low, atol=max(tolerance, low) * scale)
