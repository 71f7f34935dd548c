"""One time step of the recurrent cells, forward and backward, in NumPy; Keras' gate orders and activations.

Shapes: B sequences, U units, G gates. `projected` [B, G*U] is x_t @ kernel + bias; states are [B, U].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import special

SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772


# -- activations ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Activation:
    """A function and its derivative, `derivative(x, y)` with y = function(x)."""

    function: Callable[[np.ndarray], np.ndarray]
    derivative: Callable[[np.ndarray, np.ndarray], np.ndarray]


def _hard_sigmoid(x):
    return np.clip(x / 6 + x.dtype.type(0.5), 0, 1)


def _selu(x):
    return (SELU_SCALE * np.where(x > 0, x, SELU_ALPHA * np.expm1(np.minimum(x, 0)))).astype(x.dtype)


def _selu_derivative(x, y):
    return SELU_SCALE * np.where(x > 0, 1, SELU_ALPHA * np.exp(np.minimum(x, 0)))


def _silu_derivative(x, y):
    gate = special.expit(x)
    return gate + y * (1 - gate)


ACTIVATIONS: dict[str, Activation] = {
    "linear": Activation(lambda x: x, lambda x, y: np.ones_like(x)),
    "tanh": Activation(np.tanh, lambda x, y: 1 - y * y),
    "sigmoid": Activation(special.expit, lambda x, y: y * (1 - y)),
    "relu": Activation(lambda x: np.maximum(x, 0), lambda x, y: x > 0),
    "relu6": Activation(lambda x: np.clip(x, 0, 6), lambda x, y: (x > 0) & (x < 6)),
    "hard_sigmoid": Activation(_hard_sigmoid, lambda x, y: (np.abs(x) < 3) / x.dtype.type(6)),
    "hard_tanh": Activation(lambda x: np.clip(x, -1, 1), lambda x, y: np.abs(x) < 1),
    "softsign": Activation(lambda x: x / (1 + np.abs(x)), lambda x, y: 1 / np.square(1 + np.abs(x))),
    "softplus": Activation(lambda x: np.logaddexp(x, x.dtype.type(0)), lambda x, y: special.expit(x)),
    "elu": Activation(lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))), lambda x, y: np.where(x > 0, 1, y + 1)),
    "selu": Activation(_selu, _selu_derivative),
    "silu": Activation(lambda x: x * special.expit(x), _silu_derivative),
    "exponential": Activation(np.exp, lambda x, y: y),
}

GATES = {"lstm": 4, "gru": 3, "simple": 1}
STATES = {"lstm": 2, "gru": 1, "simple": 1}


# -- cells ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Step:
    """What the backward step needs of a forward one."""

    states: tuple  # before the step
    new_states: tuple
    pre_activations: tuple  # gates before their activation, in the cell's order
    gates: tuple
    recurrent: np.ndarray | None = None  # GRU: recurrent projection of the candidate


@dataclass(frozen=True)
class Cell:
    """A cell with its activations; `forward` makes a Step, `backward` goes through it in reverse."""

    kind: str
    activation: Activation
    recurrent_activation: Activation
    reset_after: bool

    def forward(self, projected, states, recurrent_kernel, recurrent_bias) -> Step:
        """One step: projected [B, G*U], states each [B, U], recurrent_kernel [U, G*U], recurrent_bias [G*U]."""
        return getattr(self, f"_{self.kind}")(projected, states, recurrent_kernel, recurrent_bias)

    def backward(self, step: Step, cotangents: tuple, recurrent_kernel) -> tuple:
        """(cotangent of projected, of recurrent_kernel, of recurrent_bias, of the states before the step)."""
        return getattr(self, f"_{self.kind}_backward")(step, cotangents, recurrent_kernel)

    def _simple(self, projected, states, recurrent_kernel, recurrent_bias):
        x = projected + states[0] @ recurrent_kernel + recurrent_bias
        y = self.activation.function(x)
        return Step(states, (y,), (x,), (y,))

    def _simple_backward(self, step, cotangents, recurrent_kernel):
        d = cotangents[0] * self.activation.derivative(step.pre_activations[0], step.gates[0])
        return d, step.states[0].T @ d, d.sum(0), (d @ recurrent_kernel.T,)

    def _lstm(self, projected, states, recurrent_kernel, recurrent_bias):
        h, c = states
        i, f, g, o = pre = np.split(projected + h @ recurrent_kernel + recurrent_bias, 4, axis=1)
        inner, outer = self.recurrent_activation.function, self.activation.function
        i, f, g, o = gates = inner(i), inner(f), outer(g), inner(o)
        new_c = f * c + i * g
        return Step(states, (o * outer(new_c), new_c), tuple(pre), gates)

    def _lstm_backward(self, step, cotangents, recurrent_kernel):
        (h, c), (_, new_c) = step.states, step.new_states
        i, f, g, o = step.gates
        squashed = self.activation.function(new_c)
        to_c = cotangents[1] + cotangents[0] * o * self.activation.derivative(new_c, squashed)
        inner, outer = self.recurrent_activation.derivative, self.activation.derivative
        rules = (inner, inner, outer, inner)
        to_gates = (to_c * g, to_c * c, to_c * i, cotangents[0] * squashed)
        parts = [d * rule(x, y) for d, rule, x, y in zip(to_gates, rules, step.pre_activations, step.gates)]
        d = np.concatenate(parts, axis=1)
        return d, h.T @ d, d.sum(0), (d @ recurrent_kernel.T, to_c * f)

    def _gru(self, projected, states, recurrent_kernel, recurrent_bias):
        (h,) = states
        units = h.shape[1]
        x_z, x_r, x_h = np.split(projected, 3, axis=1)
        inner, outer = self.recurrent_activation.function, self.activation.function
        gates = h @ recurrent_kernel[:, : 2 * units] + recurrent_bias[: 2 * units]
        z, r = x_z + gates[:, :units], x_r + gates[:, units:]
        z_gate, r_gate = inner(z), inner(r)
        # The reset gate comes after the product with the candidate's weights, or scales the state before it.
        kernel, bias = recurrent_kernel[:, 2 * units :], recurrent_bias[2 * units :]
        recurrent = h @ kernel + bias if self.reset_after else (r_gate * h) @ kernel + bias
        candidate = x_h + (r_gate * recurrent if self.reset_after else recurrent)
        n = outer(candidate)
        return Step(states, (z_gate * h + (1 - z_gate) * n,), (z, r, candidate), (z_gate, r_gate, n), recurrent)

    def _gru_backward(self, step, cotangents, recurrent_kernel):
        (h,), (to_new,) = step.states, cotangents
        (z, r, candidate), (z_gate, r_gate, n) = step.pre_activations, step.gates
        units = h.shape[1]
        kernel = recurrent_kernel[:, 2 * units :]
        inner, outer = self.recurrent_activation.derivative, self.activation.derivative
        d_z = to_new * (h - n) * inner(z, z_gate)
        d_n = to_new * (1 - z_gate) * outer(candidate, n)
        to_h = to_new * z_gate
        if self.reset_after:
            d_recurrent = d_n * r_gate
            d_r = d_n * step.recurrent * inner(r, r_gate)
            to_h = to_h + d_recurrent @ kernel.T
            to_kernel = h.T @ d_recurrent
        else:
            d_recurrent = d_n
            to_scaled = d_n @ kernel.T
            d_r = to_scaled * h * inner(r, r_gate)
            to_h = to_h + to_scaled * r_gate
            to_kernel = (r_gate * h).T @ d_recurrent
        d_gates = np.concatenate([d_z, d_r], axis=1)
        to_h = to_h + d_gates @ recurrent_kernel[:, : 2 * units].T
        to_kernel = np.concatenate([h.T @ d_gates, to_kernel], axis=1)
        to_bias = np.concatenate([d_gates, d_recurrent], axis=1).sum(0)
        return np.concatenate([d_gates, d_n], axis=1), to_kernel, to_bias, (to_h,)
