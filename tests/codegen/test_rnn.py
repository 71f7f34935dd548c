"""Recurrent kernels against the reference: cells, masks, directions, groups of layers."""

from __future__ import annotations

import numpy as np
import pytest

from kgraph import ops
from kgraph.codegen.cpu import rnn
from kgraph.ir import PRIMITIVES, Dim, Graph, Node, TensorType, Value, make_node
from kgraph.ops import recurrent
from kgraph.ops.recurrent_cells import ACTIVATIONS, GATES, STATES
from tests.codegen.driver import host_target, run_node
from tests.codegen.samples import check_sample, compare

N, L = Dim.symbol("N"), Dim.symbol("L")
assert ops
NATIVE = [s for s in recurrent.RNN.samples() if s.args[0].dtype == np.float32]


@pytest.mark.parametrize("sample", NATIVE, ids=lambda s: s.name)
def test_samples(sample):
    check_sample(rnn, recurrent.RNN, sample, parts=2)


def operands(cell, batch, steps, features, units, mask=False, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    width = units * GATES[cell]
    shapes = [(batch, steps, features), (features, width), (units, width), (width,), (width,)]
    shapes += [(batch, units)] * STATES[cell]
    arrays = [rng.uniform(-1, 1, s).astype(dtype) for s in shapes]
    arrays[1:3] = (a / np.sqrt(len(a)).astype(dtype) for a in arrays[1:3])
    return [*arrays, rng.random((batch, steps)) < 0.7] if mask else arrays


def attributes(cell, **changes):
    return {"cell": cell, "activation": "tanh", "recurrent_activation": "sigmoid", "reset_after": True,
            "reverse": False, "has_mask": False, "zero_output_for_mask": False, **changes}  # fmt: skip


def values_of(arrays, symbolic=True):
    out = []
    for k, a in enumerate(arrays):
        shape = list(a.shape)
        if symbolic and (k == 0 or k >= 5):
            shape[0] = N
        if symbolic and (k == 0 or a.dtype == bool):
            shape[1] = L
        out.append(Value(TensorType(tuple(shape), a.dtype.name)))
    return out


def run(arrays, parts=1, target=None, symbolic=True, **attrs):
    node = make_node(recurrent.RNN, values_of(arrays, symbolic), attrs)
    assert rnn.accepts(node) is None
    batch, steps, _ = arrays[0].shape
    return run_node(rnn.lower, node, arrays, {"N": batch, "L": steps}, parts, target)


def expected(arrays, **attrs):
    return recurrent.RNN.reference(*(a if a.dtype == bool else a.astype(np.float64) for a in arrays), **attrs)


@pytest.mark.parametrize("cell", ["lstm", "gru", "simple"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_cells_with_symbolic_sizes(cell, reverse, mask):
    for batch, steps, features, units in [(19, 37, 6, 20), (1, 5, 40, 64)][: 1 + (mask and reverse)]:
        arrays = operands(cell, batch, steps, features, units, mask)
        attrs = attributes(cell, reverse=reverse, has_mask=mask)
        results = run(arrays, **attrs)
        for result, wanted in zip(results, expected(arrays, **attrs)):
            compare(result, wanted, 1e-5)
        for result, whole in zip(run(arrays, 3, **attrs), results):
            np.testing.assert_array_equal(result, whole)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_double_precision(cell):
    arrays = operands(cell, 3, 18, 7, 9, dtype="float64")
    attrs = attributes(cell, reset_after=False)
    for result, wanted in zip(run(arrays, **attrs), expected(arrays, **attrs)):
        compare(result, wanted, 1e-12)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations(activation):
    arrays = operands("simple", 3, 2, 5, 18)
    attrs = attributes("simple", activation=activation)
    for result, wanted in zip(run(arrays, symbolic=False, **attrs), expected(arrays, **attrs)):
        compare(result, wanted, 1e-5)


def test_wide_layer_and_narrow_vectors():
    arrays = operands("lstm", 18, 3, 33, 300)
    attrs = attributes("lstm")
    for result, wanted in zip(run(arrays, symbolic=False, **attrs), expected(arrays, **attrs)):
        compare(result, wanted, 1e-5)
    arrays = operands("gru", 9, 3, 5, 20)
    attrs = attributes("gru")
    for result, wanted in zip(run(arrays, target=host_target(32), **attrs), expected(arrays, **attrs)):
        compare(result, wanted, 1e-5)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_both_directions_as_one_kernel(parts, joined):
    """joined: with the concatenation of their sequences, whose parts are no whole vectors."""
    first, second = operands("lstm", 17, 9, 6, 20), operands("lstm", 17, 9, 6, 20, seed=1)
    second[0] = first[0]
    shared, *forward = values_of(first)
    backward = values_of(second)[1:]
    graph = Graph([shared, *forward, *backward])
    results = []
    for own, reverse in ((forward, False), (backward, True)):
        results += graph.add(recurrent.RNN, (shared, *own), **attributes("lstm", reverse=reverse))
    if joined:
        whole = graph.add(PRIMITIVES["concatenate"], (results[0], results[3]), axis=2)
        results = [whole, *results[1:3], *results[4:]]
    graph.outputs = results
    inputs = [Value(v.type) for v in graph.inputs]
    node = Node(PRIMITIVES["fusion"], inputs, {"kind": "rnn", "body": graph}, [v.type for v in results])
    assert rnn.accepts(node) is None
    got = run_node(rnn.lower, node, [*first, *second[1:]], {"N": 17, "L": 9}, parts)
    wanted = [*run(first, **attributes("lstm")), *run(second, **attributes("lstm", reverse=True))]
    if joined:
        wanted = [np.concatenate([wanted[0], wanted[3]], axis=2), *wanted[1:3], *wanted[4:]]
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(a, b)
