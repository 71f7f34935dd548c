"""Recurrent layers over whole sequences: `rnn`, and its gradient as a primitive of its own."""

from __future__ import annotations

import numpy as np

from kgraph.errors import ShapeError
from kgraph.ir import NotDifferentiable, Primitive, Sample, TensorType, bind, register
from kgraph.ops.common import require_same_dtype, sizes_differ, uniform, widened
from kgraph.ops.recurrent_cells import ACTIVATIONS, GATES, STATES, Cell
from kgraph.ops.rules import dtype_error, require_float, shape_error

__all__ = ["rnn", "rnn_gradient"]


def _check(name: str, types, *, cell, activation, recurrent_activation, has_mask) -> tuple[TensorType, TensorType]:
    """Types of the sequence and of one state. Raises ShapeError or DTypeError."""
    if cell not in GATES:
        raise ShapeError(f"{name}: cell {cell!r}: expected one of {sorted(GATES)}")
    for function in (activation, recurrent_activation):
        if function not in ACTIVATIONS:
            raise ShapeError(f"{name}: activation {function!r}: expected one of {sorted(ACTIVATIONS)}")
    count = 5 + STATES[cell]
    if len(types) != count + has_mask:
        layout = "x, kernel, recurrent_kernel, bias, recurrent_bias"
        raise shape_error(name, types, f"{layout}, {STATES[cell]} states, then a mask with has_mask")
    require_same_dtype(name, *types[:count])
    require_float(name, *types[:count])
    x, kernel, recurrent_kernel, bias, recurrent_bias = types[:5]
    if x.rank != 3 or kernel.rank != 2 or recurrent_kernel.rank != 2:
        raise shape_error(name, types, "x[B,T,I], kernel[I,G*U], recurrent_kernel[U,G*U]")
    batch, steps, features = x.shape
    units = recurrent_kernel.shape[0]
    width = units * GATES[cell]
    expected: list[tuple[TensorType, tuple]] = [(kernel, (features, width)), (recurrent_kernel, (units, width))]
    expected += [(bias, (width,)), (recurrent_bias, (width,))]
    expected += [(state, (batch, units)) for state in types[5:count]]
    if has_mask:
        expected.append((types[count], (batch, steps)))
        if types[count].dtype != "bool":
            raise dtype_error(name, types, "a bool mask")
    for t, shape in expected:
        if t.rank != len(shape) or any(sizes_differ(a, b) for a, b in zip(t.shape, shape)):
            raise shape_error(
                name,
                types,
                f"x[B,T,I], kernel[I,G*U], recurrent_kernel[U,G*U], biases [G*U], states [B,U], mask [B,T]"
                f" with G = {GATES[cell]}; {t} is not [{','.join(map(str, shape))}]",
            )
    return x.with_shape((batch, steps, units)), x.with_shape((batch, units))


def _infer(*types, cell, activation, recurrent_activation, reset_after, reverse, has_mask, zero_output_for_mask):
    sequence, state = _check(
        "rnn",
        types,
        cell=cell,
        activation=activation,
        recurrent_activation=recurrent_activation,
        has_mask=has_mask,
    )
    return (sequence, *(state,) * STATES[cell])


def _run(arrays, attrs, keep: bool) -> tuple:
    """(sequence, final states, [(t, Step)] in the order of computation, empty unless `keep`)."""
    cell = Cell(
        attrs["cell"],
        ACTIVATIONS[attrs["activation"]],
        ACTIVATIONS[attrs["recurrent_activation"]],
        attrs["reset_after"],
    )
    x, kernel, recurrent_kernel, bias, recurrent_bias = arrays[:5]
    states = tuple(arrays[5 : 5 + STATES[cell.kind]])
    mask = arrays[-1] if attrs["has_mask"] else None
    projected = x @ kernel + bias
    sequence = np.zeros((*x.shape[:2], recurrent_kernel.shape[0]), x.dtype)
    steps = []
    for t in range(x.shape[1])[:: -1 if attrs["reverse"] else 1]:
        step = cell.forward(projected[:, t], states, recurrent_kernel, recurrent_bias)
        if keep:
            steps.append((t, step))
        if mask is None:
            states = step.new_states
            sequence[:, t] = states[0]
            continue
        valid = mask[:, t, None]
        skipped = 0 if attrs["zero_output_for_mask"] else states[0]
        sequence[:, t] = np.where(valid, step.new_states[0], skipped)
        states = tuple(np.where(valid, new, old) for new, old in zip(step.new_states, states))
    return cell, sequence, states, steps


@widened
def _reference(*arrays, **attrs):
    _, sequence, states, _ = _run(arrays, attrs, keep=False)
    return (sequence, *states)


def _gradient(cotangents, inputs, outputs, **attrs):
    return (*rnn_gradient(*inputs, *cotangents, **attrs), *((None,) if attrs["has_mask"] else ()))


def _samples():
    def sample(name, cell, shape=(2, 5, 3, 4), mask=False, dtype="float32", **changes):
        batch, steps, features, units = shape
        width = units * GATES[cell]
        shapes = [(batch, steps, features), (features, width), (units, width), (width,), (width,)]
        shapes += [(batch, units)] * STATES[cell]
        arrays = [uniform(s, -1, 1, dtype, seed=i) for i, s in enumerate(shapes)]
        attrs = {
            "cell": cell,
            "activation": "tanh",
            "recurrent_activation": "sigmoid",
            "reset_after": True,
            "reverse": False,
            "has_mask": mask,
            "zero_output_for_mask": False,
            **changes,
        }
        if mask:
            valid = np.random.default_rng(3).integers(0, 4, (batch, steps)) > 0
            valid[:, 0] = np.arange(batch) % 2 == 0  # some sequences begin with a masked step
            arrays.append(valid)
        return Sample(tuple(arrays), attrs, name)

    return [
        sample("lstm", "lstm"),
        sample("lstm, backward in time, masked", "lstm", mask=True, reverse=True),
        sample("lstm, other activations", "lstm", activation="softsign", recurrent_activation="hard_sigmoid"),
        sample("gru", "gru"),
        sample("gru, reset before", "gru", reset_after=False, reverse=True),
        sample("gru, masked", "gru", mask=True),
        sample("gru, reset before, masked with zeros", "gru", mask=True, reset_after=False, zero_output_for_mask=True),
        sample("simple", "simple"),
        sample(
            "simple, softplus, masked with zeros", "simple", mask=True, activation="softplus", zero_output_for_mask=True
        ),
        *(sample(f"simple, {name}", "simple", (2, 3, 3, 4), activation=name) for name in ACTIVATIONS),
        sample("odd sizes", "lstm", (3, 7, 5, 17)),
        sample("one step, one unit", "gru", (1, 1, 2, 1)),
        sample("empty batch", "lstm", (0, 3, 2, 4)),
        sample("no steps", "gru", (2, 0, 2, 4)),
        sample("bfloat16", "lstm", dtype="bfloat16"),
    ]


RNN = register(
    Primitive(
        name="rnn",
        infer=_infer,
        reference=_reference,
        gradient=_gradient,
        traits=frozenset({"coarse"}),
        samples=_samples,
        tolerance=1e-5,
        results=0,
    )
)


def _attrs(cell, activation, recurrent_activation, reset_after, reverse, has_mask, zero_output_for_mask) -> dict:
    return {
        "cell": cell,
        "activation": activation,
        "recurrent_activation": recurrent_activation,
        "reset_after": bool(reset_after),
        "reverse": bool(reverse),
        "has_mask": bool(has_mask),
        "zero_output_for_mask": bool(zero_output_for_mask),
    }


def rnn(
    x,
    kernel,
    recurrent_kernel,
    bias,
    recurrent_bias,
    *states_and_mask,
    cell: str,
    activation: str = "tanh",
    recurrent_activation: str = "sigmoid",
    reset_after: bool = True,
    reverse: bool = False,
    has_mask: bool = False,
    zero_output_for_mask: bool = False,
):
    """A recurrent layer over x[B, T, I]; gives (sequence[B, T, U], final state, ...), all of the dtype of x (float).

    kernel: [I, G*U]. recurrent_kernel: [U, G*U]. bias, recurrent_bias: [G*U] (zeros where a layer has none).
    cell: "lstm" (G = 4, gates i, f, c, o; states h, c), "gru" (G = 3, gates z, r, h; state h), "simple" (G = 1).
    states_and_mask: the initial states [B, U], then with `has_mask` a bool mask [B, T].
    activation, recurrent_activation: Keras' names, those of `ACTIVATIONS`.
    reset_after: GRU only: the reset gate applies behind the recurrent product (Keras' default) or to its operand.
    reverse: time runs backwards; sequence[:, t] still belongs to x[:, t] (Keras' `go_backwards` reverses it).
    mask: where False a step keeps the states, and puts out the state h before the step, or zeros with
        `zero_output_for_mask`.
    Raises ShapeError, DTypeError.
    """
    attrs = _attrs(cell, activation, recurrent_activation, reset_after, reverse, has_mask, zero_output_for_mask)
    return bind(RNN, x, kernel, recurrent_kernel, bias, recurrent_bias, *states_and_mask, **attrs)


# -- gradient ---------------------------------------------------------------------------------------------------------
def _infer_gradient(*types, cell, has_mask, activation, recurrent_activation, **attrs):
    if cell not in GATES or len(types) < 6 + 2 * STATES[cell] + has_mask:
        raise shape_error("rnn_gradient", types, "the operands of rnn, then one cotangent per result")
    count = 5 + STATES[cell] + has_mask
    results = _check(
        "rnn_gradient",
        types[:count],
        cell=cell,
        activation=activation,
        recurrent_activation=recurrent_activation,
        has_mask=has_mask,
    )
    wanted = (results[0], *(results[1],) * STATES[cell])
    if types[count:] != wanted:
        raise shape_error("rnn_gradient", types, "cotangents of the types of the results of rnn")
    return tuple(types[: 5 + STATES[cell]])


@widened
def _reference_gradient(*arrays, **attrs):
    count = 5 + STATES[attrs["cell"]] + attrs["has_mask"]
    operands, (to_sequence, *to_states) = arrays[:count], arrays[count:]
    x, kernel, recurrent_kernel = operands[:3]
    cell, _, _, steps = _run(operands, attrs, keep=True)
    to_projected = np.zeros((*x.shape[:2], kernel.shape[1]), x.dtype)
    to_recurrent_kernel = np.zeros_like(recurrent_kernel)
    to_recurrent_bias = np.zeros(kernel.shape[1], x.dtype)
    for t, step in reversed(steps):
        valid = operands[-1][:, t, None] if attrs["has_mask"] else np.True_
        # Through the masked steps: the states pass, and the output is the state before the step, or zeros.
        passed = [np.where(valid, 0, d) for d in to_states]
        if not attrs["zero_output_for_mask"]:
            passed[0] = passed[0] + np.where(valid, 0, to_sequence[:, t])
        inner = [np.where(valid, d, 0) for d in to_states]
        inner[0] = inner[0] + np.where(valid, to_sequence[:, t], 0)
        to_projected[:, t], d_kernel, d_bias, before = cell.backward(step, tuple(inner), recurrent_kernel)
        to_recurrent_kernel += d_kernel
        to_recurrent_bias += d_bias
        to_states = [a + b for a, b in zip(passed, before)]
    return (
        to_projected @ kernel.T,
        np.einsum("bti,btg->ig", x, to_projected),
        to_recurrent_kernel,
        to_projected.sum((0, 1)),
        to_recurrent_bias,
        *to_states,
    )


def _samples_gradient():
    out = []
    for sample in _samples():
        results = _reference(*sample.args, **sample.attrs)
        cotangents = tuple(uniform(r.shape, dtype=sample.args[0].dtype.name, seed=9 + i) for i, r in enumerate(results))
        out.append(Sample((*sample.args, *cotangents), sample.attrs, sample.name))
    return out


RNN_GRADIENT = register(
    Primitive(
        name="rnn_gradient",
        infer=_infer_gradient,
        reference=_reference_gradient,
        gradient=NotDifferentiable("second derivatives of recurrent layers are not provided"),
        traits=frozenset({"coarse"}),
        samples=_samples_gradient,
        tolerance=1e-5,
        results=0,
    )
)


def rnn_gradient(
    *operands, cell: str, activation, recurrent_activation, reset_after, reverse, has_mask, zero_output_for_mask
):
    """The cotangents of x, kernel, recurrent_kernel, bias, recurrent_bias and the initial states of `rnn`.

    operands: those of `rnn`, then one cotangent per result of `rnn`. The attributes are those of `rnn`. The steps are
    computed again; back-propagation through time follows.
    """
    attrs = _attrs(cell, activation, recurrent_activation, reset_after, reverse, has_mask, zero_output_for_mask)
    return bind(RNN_GRADIENT, *operands, **attrs)
