"""Normalisation, softmax and its relatives against their definitions, line by line in float64."""

import numpy as np
import pytest
from scipy import special

from kgraph import ops
from kgraph.errors import DTypeError, ShapeError
from kgraph.ir import PRIMITIVES, Dim, TensorType

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def standardised(line, epsilon):
    line = np.asarray(line, np.float64)
    return (line - line.mean()) / np.sqrt(np.mean((line - line.mean()) ** 2) + epsilon)


def test_batch_norm_uses_given_statistics():
    x, gamma, beta = normal(2, 3, 4), normal(3), normal(3)
    mean, variance = normal(3), np.abs(normal(3))
    got = ops.batch_norm(x, mean, variance, gamma, beta, axis=1, epsilon=1e-3)
    for n, c, i in np.ndindex(*x.shape):
        expected = (x[n, c, i] - mean[c]) / np.sqrt(variance[c] + 1e-3) * gamma[c] + beta[c]
        assert got[n, c, i] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_layer_norm_over_the_last_axis():
    x, gamma, beta = normal(2, 3, 7), normal(7), normal(7)
    got = ops.layer_norm(x, gamma, beta, axes=-1, epsilon=1e-3)
    for n, t in np.ndindex(2, 3):
        np.testing.assert_allclose(got[n, t], standardised(x[n, t], 1e-3) * gamma + beta, rtol=1e-4, atol=1e-5)


def test_layer_norm_over_several_axes_and_over_one_in_the_middle():
    x, gamma, beta = normal(2, 3, 5), normal(3, 5), normal(3, 5)
    got = ops.layer_norm(x, gamma, beta, axes=(1, 2), epsilon=1e-5)
    for n in range(2):
        np.testing.assert_allclose(got[n], standardised(x[n], 1e-5) * gamma + beta, rtol=1e-4, atol=1e-5)
    got = ops.layer_norm(x, gamma[:, :1], beta[:, :1], axes=(1,), epsilon=1e-5)
    for n, c in np.ndindex(2, 5):
        expected = standardised(x[n, :, c], 1e-5) * gamma[:, 0] + beta[:, 0]
        np.testing.assert_allclose(got[n, :, c], expected, rtol=1e-4, atol=1e-5)


def test_rms_norm_does_not_centre():
    x, gamma = normal(4, 7) + 5, normal(7)
    got = ops.rms_norm(x, gamma, epsilon=1e-6)
    expected = x / np.sqrt(np.mean(x.astype(np.float64) ** 2, -1, keepdims=True) + 1e-6) * gamma
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_group_norm_takes_statistics_per_sample_and_group():
    x, gamma, beta = normal(2, 3, 4, 6), normal(6), normal(6)
    got = ops.group_norm(x, gamma, beta, groups=3, epsilon=1e-3)
    for n, g in np.ndindex(2, 3):
        own = slice(2 * g, 2 * g + 2)
        expected = standardised(x[n, :, :, own], 1e-3) * gamma[own] + beta[own]
        np.testing.assert_allclose(got[n, :, :, own], expected, rtol=1e-4, atol=1e-5)


def test_half_precisions_are_computed_in_float32():
    x = np.full((1, 4096), 300, "float16")
    one, zero = np.ones(4096, "float16"), np.zeros(4096, "float16")
    np.testing.assert_array_equal(ops.rms_norm(x, one), one[None])  # the sum of squares exceeds float16 by far
    np.testing.assert_array_equal(ops.layer_norm(x, one, zero), zero[None])


def test_wrong_parameters_are_refused():
    x, vector = normal(2, 6), normal(6)
    with pytest.raises(ShapeError, match="batch_norm"):
        ops.batch_norm(x, vector[:5], vector, vector, vector)
    with pytest.raises(ShapeError, match=r"layer_norm.*broadcast"):
        ops.layer_norm(x, normal(5), vector)
    with pytest.raises(ShapeError, match="4 groups"):
        ops.group_norm(x, vector, vector, groups=4)
    with pytest.raises(DTypeError, match="rms_norm"):
        ops.rms_norm(x.astype(np.int32), vector.astype(np.int32))


def test_shape_rules_keep_symbolic_sizes():
    n = Dim.symbol("N")
    x, v = TensorType((n, 2 * n, 6), "float32"), TensorType((6,), "float32")
    assert PRIMITIVES["layer_norm"].infer(x, v, v, axes=(2,), epsilon=1e-3) == x
    assert PRIMITIVES["group_norm"].infer(x, v, v, groups=3, epsilon=1e-3) == x
    assert PRIMITIVES["softmax"].infer(x, axis=1) == x
    assert PRIMITIVES["logsumexp"].infer(x, axes=(0, 2), keepdims=False).shape == (2 * n,)


# -- softmax ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [-1, 0, 1, (0, 2), (0, 1, 2)])
def test_softmax_and_relatives_agree_with_scipy(axis):
    x = normal(3, 4, 5) * 30
    np.testing.assert_allclose(ops.softmax(x, axis=axis), special.softmax(x, axis=axis), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(ops.log_softmax(x, axis=axis), special.log_softmax(x, axis=axis), rtol=1e-5, atol=1e-5)
    for keepdims in (False, True):
        got = ops.logsumexp(x, axes=axis, keepdims=keepdims)
        np.testing.assert_allclose(got, special.logsumexp(x, axis=axis, keepdims=keepdims), rtol=1e-5)


def test_infinite_entries():
    x = np.array([[-np.inf, 0.0], [-np.inf, -np.inf], [np.inf, 0.0]], np.float32)
    np.testing.assert_array_equal(ops.softmax(x)[0], [0, 1])
    assert np.isnan(ops.softmax(x)[1]).all()
    np.testing.assert_array_equal(ops.logsumexp(x, axes=1), [0, -np.inf, np.inf])
    (gradient,) = PRIMITIVES["logsumexp"].gradient(
        (np.ones(3, np.float32),), (x,), (ops.logsumexp(x, axes=1),), axes=(1,), keepdims=False
    )
    np.testing.assert_array_equal(gradient[:2], [[0, 1], [0, 0]])


def test_softmax_refuses_integers_and_axes_out_of_range():
    with pytest.raises(DTypeError, match="softmax"):
        ops.softmax(np.arange(3))
    with pytest.raises(ShapeError, match="softmax"):
        ops.softmax(normal(3), axis=1)
