"""rnn against the cells' equations, one sequence, one step and one unit at a time."""

import math

import numpy as np
import pytest

from kgraph import ops
from kgraph.errors import DTypeError, ShapeError
from kgraph.ir import PRIMITIVES, Dim, TensorType
from kgraph.ops.recurrent_cells import ACTIVATIONS, GATES

SCALAR_ACTIVATIONS = {
    "linear": lambda x: x,
    "tanh": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "relu": lambda x: max(x, 0.0),
    "relu6": lambda x: min(max(x, 0.0), 6.0),
    "hard_sigmoid": lambda x: min(max(x / 6 + 0.5, 0.0), 1.0),
    "hard_tanh": lambda x: min(max(x, -1.0), 1.0),
    "softsign": lambda x: x / (1 + abs(x)),
    "softplus": lambda x: math.log1p(math.exp(x)),
    "elu": lambda x: x if x > 0 else math.expm1(x),
    "selu": lambda x: 1.0507009873554805 * (x if x > 0 else 1.6732632423543772 * math.expm1(x)),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "exponential": math.exp,
}


def one_step(cell, x, states, kernel, recurrent_kernel, bias, recurrent_bias, f, g, reset_after):
    """New states of one sequence: f squashes candidates and outputs, g the gates."""
    h = states[0]
    units = len(h)
    inputs = lambda gate, u: bias[gate * units + u] + x @ kernel[:, gate * units + u]
    recurrent = lambda gate, u, h=h: recurrent_bias[gate * units + u] + h @ recurrent_kernel[:, gate * units + u]
    gate = lambda number, u: inputs(number, u) + recurrent(number, u)
    if cell == "simple":
        return [np.array([f(gate(0, u)) for u in range(units)])]
    if cell == "lstm":
        c = [g(gate(1, u)) * states[1][u] + g(gate(0, u)) * f(gate(2, u)) for u in range(units)]
        return [np.array([g(gate(3, u)) * f(c[u]) for u in range(units)]), np.array(c)]
    z = [g(gate(0, u)) for u in range(units)]
    r = np.array([g(gate(1, u)) for u in range(units)])
    if reset_after:
        n = [f(inputs(2, u) + r[u] * recurrent(2, u)) for u in range(units)]
    else:
        n = [f(inputs(2, u) + recurrent(2, u, r * h)) for u in range(units)]
    return [np.array([z[u] * h[u] + (1 - z[u]) * n[u] for u in range(units)])]


def rnn_loop(arrays, cell, activation, recurrent_activation, reset_after, reverse, has_mask, zero_output_for_mask):
    x, weights, rest = arrays[0], arrays[1:5], list(arrays[5:])
    mask = rest.pop() if has_mask else np.ones(x.shape[:2], bool)
    sequence = np.zeros((*x.shape[:2], weights[1].shape[0]))
    finals = [s.copy() for s in rest]
    functions = SCALAR_ACTIVATIONS[activation], SCALAR_ACTIVATIONS[recurrent_activation]
    for b in range(x.shape[0]):
        states = [s[b] for s in rest]
        for t in range(x.shape[1])[:: -1 if reverse else 1]:
            if mask[b, t]:
                states = one_step(cell, x[b, t], states, *weights, *functions, reset_after)
                sequence[b, t] = states[0]
            elif not zero_output_for_mask:
                sequence[b, t] = states[0]
        for final, s in zip(finals, states):
            final[b] = s
    return sequence, *finals


@pytest.mark.parametrize("sample", PRIMITIVES["rnn"].samples(), ids=lambda s: s.name)
def test_rnn_agrees_with_the_equations(sample):
    wide = [a if a.dtype == bool else a.astype(np.float64) for a in sample.args]
    expected = rnn_loop(wide, **sample.attrs)
    got = ops.rnn(*sample.args, **sample.attrs)
    tolerance = 2e-2 if sample.args[0].dtype.name == "bfloat16" else 1e-5
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(g.astype(np.float64), e, rtol=tolerance, atol=tolerance)


def test_every_activation_is_tested():
    assert SCALAR_ACTIVATIONS.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_their_derivatives(name):
    x = np.linspace(-7.01, 7.03, 60)
    a = ACTIVATIONS[name]
    np.testing.assert_allclose(a.function(x), [SCALAR_ACTIVATIONS[name](v) for v in x], rtol=1e-12, atol=1e-12)
    numeric = (a.function(x + 1e-6) - a.function(x - 1e-6)) / 2e-6
    np.testing.assert_allclose(a.derivative(x, a.function(x)) * np.ones_like(x), numeric, rtol=1e-6, atol=1e-6)
    narrow = x.astype(np.float32)
    assert a.function(narrow).dtype == np.float32


def types_of(cell, batch, steps):
    width = 5 * GATES[cell]
    shapes = [(batch, steps, 3), (3, width), (5, width), (width,), (width,), *[(batch, 5)] * (1 + (cell == "lstm"))]
    return [TensorType(s, "float32") for s in shapes]


ATTRS = {
    "activation": "tanh",
    "recurrent_activation": "sigmoid",
    "reset_after": True,
    "reverse": False,
    "has_mask": False,
    "zero_output_for_mask": False,
}


@pytest.mark.parametrize("cell", GATES)
def test_batch_and_time_may_be_symbolic(cell):
    n, t = Dim.symbol("N"), Dim.symbol("T")
    sequence, *states = PRIMITIVES["rnn"].infer(*types_of(cell, n, t), cell=cell, **ATTRS)
    assert sequence.shape == (n, t, 5)
    assert [s.shape for s in states] == [(n, 5)] * (1 + (cell == "lstm"))


def test_wrong_operands_are_refused():
    arrays = [np.zeros(t.shape, np.float32) for t in types_of("lstm", 2, 4)]
    with pytest.raises(ShapeError, match="2 states"):
        ops.rnn(*arrays[:-1], cell="lstm")
    with pytest.raises(ShapeError, match="G = 3"):
        ops.rnn(*arrays[:-1], cell="gru")
    with pytest.raises(ShapeError, match="expected one of"):
        ops.rnn(*arrays, cell="peephole")
    with pytest.raises(ShapeError, match="expected one of"):
        ops.rnn(*arrays, cell="lstm", activation="swish")
    with pytest.raises(DTypeError, match="bool mask"):
        ops.rnn(*arrays, np.zeros((2, 4), np.int32), cell="lstm", has_mask=True)
