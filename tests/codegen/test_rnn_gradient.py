"""Kernels of back-propagation through time against the reference."""

from __future__ import annotations

import numpy as np
import pytest

from kgraph.codegen.cpu import rnn, rnn_gradient
from kgraph.ir import TensorType, Value, make_node
from kgraph.ops import recurrent
from kgraph.ops.recurrent_cells import STATES
from tests.codegen.driver import run_node
from tests.codegen.samples import compare
from tests.codegen.test_rnn import L, N, attributes, operands, values_of

VARIANTS = [(False, False, False), (True, True, False), (False, True, True)]


@pytest.mark.parametrize(("cell", "reset"), [("lstm", True), ("gru", True), ("gru", False), ("simple", True)])
@pytest.mark.parametrize(("reverse", "mask", "zeros"), VARIANTS)
@pytest.mark.parametrize("units", [20, 70])
def test_gradient(cell, reset, reverse, mask, zeros, units):
    batch, steps, features = 11, 19, 6
    arrays = operands(cell, batch, steps, features, units, mask)
    attrs = attributes(cell, reverse=reverse, has_mask=mask, zero_output_for_mask=zeros, reset_after=reset)
    rng = np.random.default_rng(5)
    shapes, declared = [(batch, steps, units)], [(N, L, units)]
    shapes += [(batch, units)] * STATES[cell]
    declared += [(N, units)] * STATES[cell]
    cotangents = [rng.standard_normal(s).astype("float32") for s in shapes]
    values = [*values_of(arrays), *(Value(TensorType(s, "float32")) for s in declared)]
    node = make_node(recurrent.RNN_GRADIENT, values, attrs)
    assert rnn_gradient.accepts(node) is None
    everything = [*arrays, *cotangents]
    sizes = {"N": batch, "L": steps}
    results = run_node(rnn_gradient.lower, node, everything, sizes, 1)
    wide = [a if a.dtype == bool else a.astype(np.float64) for a in everything]
    for result, wanted in zip(results, recurrent.RNN_GRADIENT.reference(*wide, **attrs), strict=True):
        compare(result, wanted, 2e-5)
    for result, whole in zip(run_node(rnn_gradient.lower, node, everything, sizes, 2), results, strict=True):
        np.testing.assert_array_equal(result, whole)


@pytest.mark.parametrize("activation", sorted(rnn.ACTIVATIONS))
def test_gradient_activations(activation):
    arrays = operands("simple", 3, 2, 5, 18)
    attrs = attributes("simple", activation=activation)
    cotangents = [np.ones((3, 2, 18), np.float32), np.ones((3, 18), np.float32)]
    values = [Value(TensorType(a.shape, "float32")) for a in (*arrays, *cotangents)]
    node = make_node(recurrent.RNN_GRADIENT, values, attrs)
    results = run_node(rnn_gradient.lower, node, [*arrays, *cotangents])
    wide = [a.astype(np.float64) for a in (*arrays, *cotangents)]
    for result, wanted in zip(results, recurrent.RNN_GRADIENT.reference(*wide, **attrs), strict=True):
        compare(result, wanted, 2e-5)


@pytest.mark.parametrize(("cell", "reset"), [("lstm", True), ("gru", True), ("gru", False)])
def test_gradient_of_an_activation_that_is_not_monotonous(cell, reset):
    batch, steps, features, units = 5, 4, 3, 18
    arrays = operands(cell, batch, steps, features, units)
    attrs = attributes(cell, activation="silu", recurrent_activation="silu", reset_after=reset)
    rng = np.random.default_rng(5)
    shapes = [(batch, steps, units)] + [(batch, units)] * STATES[cell]
    everything = [*arrays, *[rng.standard_normal(s).astype("float32") for s in shapes]]
    node = make_node(recurrent.RNN_GRADIENT, [Value(TensorType(a.shape, "float32")) for a in everything], attrs)
    results = run_node(rnn_gradient.lower, node, everything)
    wide = [a.astype(np.float64) for a in everything]
    for result, wanted in zip(results, recurrent.RNN_GRADIENT.reference(*wide, **attrs), strict=True):
        compare(result, wanted, 2e-5)
