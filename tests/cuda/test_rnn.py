"""Recurrent layers on CUDA: blocks of sequences, more units than threads, fused layers, symbolic sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kgraph.codegen.cuda import families, rnn
from kgraph.codegen.cuda.rnn_activations import ACTIVATIONS, DERIVATIVES
from kgraph.codegen.cuda.target import make_target, simulator_target
from kgraph.ir import PRIMITIVES, Dim, Graph, Node, TensorType, Value, make_node, type_of
from kgraph.ops.recurrent import RNN, RNN_GRADIENT
from kgraph.ops.recurrent_cells import ACTIVATIONS as REFERENCES
from tests.codegen.samples import compare
from tests.cuda.driver import make, run_node

SAMPLES = {s.name: s for s in RNN.samples()}
GRADIENTS = {s.name: s for s in RNN_GRADIENT.samples()}


def check(record, node, arrays, attrs, sizes=None, **options) -> None:
    expected = record.reference(*arrays, **attrs)
    for result, wanted in zip(run_node(node, arrays, sizes, **options), expected, strict=True):
        assert result.shape == wanted.shape
        compare(result, wanted, record.tolerance)


def test_every_activation_has_a_kernel_and_a_derivative():
    assert set(ACTIVATIONS) == set(DERIVATIVES) == set(REFERENCES)


@pytest.mark.parametrize("most_blocks", [1, 2])
def test_grids_of_any_size_run_all_sequences(most_blocks):
    sample = SAMPLES["odd sizes"]  # two blocks of sequences, several units a thread
    node = make(RNN, sample)
    (*_, call) = families.lower(node, simulator_target())
    assert call.extent == 2
    check(RNN, node, sample.args, sample.attrs, most_blocks=most_blocks)


def test_sequences_beyond_the_batch_are_left_out():
    sample = GRADIENTS["odd sizes"]  # three sequences in blocks of two
    check(RNN_GRADIENT, make(RNN_GRADIENT, sample), sample.args, sample.attrs)


def test_symbolic_batches_and_steps():
    batch, steps = Dim.symbol("batch"), Dim.symbol("steps")
    sample = GRADIENTS["gru, masked"]
    symbols = {2: batch, 5: steps}

    def symbolic(array) -> Value:
        known = type_of(array)
        is_sequence = array.ndim > 1 and array.shape[0] == 2
        shape = tuple(symbols.get(n, n) if is_sequence and k < 2 else n for k, n in enumerate(known.shape))
        return Value(TensorType(shape, known.dtype))

    node = make_node(RNN_GRADIENT, [symbolic(a) for a in sample.args], sample.attrs)
    check(RNN_GRADIENT, node, sample.args, sample.attrs, {"batch": 2, "steps": 5})


def test_both_directions_are_one_launch():
    sample = SAMPLES["lstm"]
    graph = Graph([Value(type_of(a)) for a in sample.args])
    results = []
    for reverse in (False, True):
        results += graph.add(RNN, graph.inputs, **sample.attrs | {"reverse": reverse})
    graph.outputs = results
    inputs = [Value(v.type) for v in graph.inputs]
    node = Node(PRIMITIVES["fusion"], inputs, {"kind": "rnn", "body": graph}, [v.type for v in results])
    *_, call = families.lower(node, simulator_target())
    assert call.spec.name == "lstm_bidirectional"
    expected = [RNN.reference(*sample.args, **sample.attrs | {"reverse": r}) for r in (False, True)]
    for result, wanted in zip(run_node(node, list(sample.args)), [*expected[0], *expected[1]], strict=True):
        compare(result, wanted, RNN.tolerance)


def test_blocks_take_as_many_sequences_as_the_device_leaves_over():
    shape = rnn.shape_of(make(RNN, SAMPLES["lstm"]))._replace(units=128)
    target = replace(make_target((9, 0)), num_sms=100)
    rows = [rnn.rows_of(shape, batch, 1, shape.gates, 2, target) for batch in (1, 100, 101, 10000, Dim.symbol("n"))]
    assert rows == [1, 1, 2, 4, 4]
    wide = shape._replace(units=4096)
    assert rnn.rows_of(wide, 10000, 1, shape.gates, 2, target) == 1
    assert rnn.too_wide(wide, 2) is None
    assert "8192 units" in rnn.too_wide(shape._replace(units=8192), 2)


def test_states_of_masked_steps_are_those_before():
    sample = SAMPLES["lstm, backward in time, masked"]
    arrays = [np.array(a) for a in sample.args]
    arrays[-1][:] = False
    sequence, *states = run_node(make(RNN, sample), arrays)
    for state, initial in zip(states, arrays[5:7], strict=True):
        np.testing.assert_array_equal(state, initial)
    np.testing.assert_array_equal(sequence, np.broadcast_to(arrays[5][:, None], sequence.shape))
