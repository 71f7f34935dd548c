"""Recurrent layers. Keras' LSTM, GRU and SimpleRNN cells become one `rnn` primitive over the whole sequence; any other
cell is scanned step by step.

`rnn` recognises Keras' own step function (a closure of `RNN.inner_loop`) and the exact cell classes; a subclass with
its own `call` is scanned. `lstm` and `gru`, which Keras tries first, take what has no mask; they do not learn of
`zero_output_for_mask`, so masked layers come back through `rnn`, which does.
"""

from __future__ import annotations

import sys

from keras.src import tree
from keras.src.backend.common.dtypes import result_type

from kgraph import ops
from kgraph.frontend.keras_backend import numpy as knp
from kgraph.frontend.keras_backend.control_flow import scan
from kgraph.frontend.keras_backend.core import cast
from kgraph.frontend.keras_backend.core import dense_tensor as convert_to_tensor
from kgraph.frontend.keras_backend.numpy.common import Tensor, to_bool
from kgraph.frontend.keras_backend.updates import unstack
from kgraph.ops.recurrent_cells import ACTIVATIONS

_STEP = "RNN.inner_loop.<locals>.step"


def cudnn_ok(*args, **kwargs) -> bool:
    return False


def _activation_name(function) -> str | None:
    """The name under which the `rnn` primitive knows an activation of Keras, or None."""
    if function is None:
        return "linear"
    name = getattr(function, "__name__", "")
    own = getattr(sys.modules.get("keras.src.activations.activations"), name, None)
    return name if own is function and name in ACTIVATIONS else None


def _fused(
    cell: str,
    x: Tensor,
    states,
    kernel: Tensor,
    recurrent_kernel: Tensor,
    bias,
    activation,
    recurrent_activation,
    reset_after: bool = False,
    reverse: bool = False,
    mask=None,
    zero_output_for_mask: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(last output, outputs in the order of processing, final states) by the `rnn` primitive.

    Raises NotImplementedError for an activation that the primitive has not; the callers then scan the cell.
    """
    name, recurrent_name = _activation_name(activation), _activation_name(recurrent_activation)
    if name is None or recurrent_name is None:
        raise NotImplementedError(f"activations {activation}, {recurrent_activation}")
    x, kernel = convert_to_tensor(x), convert_to_tensor(kernel)
    x = cast(x, result_type(x.dtype, kernel.dtype))
    kernel, recurrent_kernel = cast(kernel, x.dtype), cast(recurrent_kernel, x.dtype)
    zeros = ops.full(shape=(kernel.shape[1],), value=0, dtype=x.dtype.name)
    bias = zeros if bias is None else cast(bias, x.dtype)
    recurrent_bias = zeros
    if cell == "gru" and len(bias.shape) == 2:
        bias, recurrent_bias = bias[0], bias[1]
    extra = [] if mask is None else [to_bool(mask)]
    sequence, *final = ops.rnn(
        x,
        kernel,
        recurrent_kernel,
        bias,
        recurrent_bias,
        *(cast(s, x.dtype) for s in states),
        *extra,
        cell=cell,
        activation=name,
        recurrent_activation=recurrent_name,
        reset_after=bool(reset_after),
        reverse=bool(reverse),
        has_mask=mask is not None,
        zero_output_for_mask=bool(zero_output_for_mask),
    )
    # A masked last step gives zeros only on request; otherwise the last output is the final state.
    last = sequence[:, 0 if reverse else -1] if zero_output_for_mask and mask is not None else final[0]
    return last, ops.rev(sequence, axes=(1,)) if reverse else sequence, list(final)


def lstm(
    inputs,
    initial_state_h,
    initial_state_c,
    mask,
    kernel,
    recurrent_kernel,
    bias,
    activation,
    recurrent_activation,
    return_sequences=False,
    go_backwards=False,
    unroll=False,
):
    """An LSTM over a batch of unmasked sequences [B, T, I]; gate order i, f, c, o."""
    if mask is not None:
        raise NotImplementedError("masked layers are recognised in `rnn`")
    states = (initial_state_h, initial_state_c)
    return _fused(
        "lstm", inputs, states, kernel, recurrent_kernel, bias, activation, recurrent_activation, reverse=go_backwards
    )


def gru(
    inputs,
    initial_state,
    mask,
    kernel,
    recurrent_kernel,
    bias,
    activation,
    recurrent_activation,
    return_sequences=False,
    go_backwards=False,
    unroll=False,
    reset_after=True,
):
    """A GRU over a batch of unmasked sequences [B, T, I]; gate order z, r, h."""
    if mask is not None:
        raise NotImplementedError("masked layers are recognised in `rnn`")
    return _fused(
        "gru",
        inputs,
        (initial_state,),
        kernel,
        recurrent_kernel,
        bias,
        activation,
        recurrent_activation,
        reset_after=reset_after,
        reverse=go_backwards,
    )


def _in_time_order(result: tuple) -> tuple:
    """A backward layer's result with its outputs in the order of time, as the bidirectional layers expect them."""
    last, outputs, states = result
    return last, ops.rev(outputs, axes=(1,)), states


def bidirectional_lstm(
    inputs,
    fwd_initial_state_h,
    fwd_initial_state_c,
    bwd_initial_state_h,
    bwd_initial_state_c,
    mask,
    fwd_kernel,
    fwd_recurrent_kernel,
    fwd_bias,
    bwd_kernel,
    bwd_recurrent_kernel,
    bwd_bias,
    activation,
    recurrent_activation,
    return_sequences=False,
    unroll=False,
):
    """Two LSTMs over the same sequences, one of them backward in time."""
    shared = {"mask": mask, "activation": activation, "recurrent_activation": recurrent_activation}
    forward = lstm(
        inputs,
        fwd_initial_state_h,
        fwd_initial_state_c,
        kernel=fwd_kernel,
        recurrent_kernel=fwd_recurrent_kernel,
        bias=fwd_bias,
        **shared,
    )
    backward = lstm(
        inputs,
        bwd_initial_state_h,
        bwd_initial_state_c,
        kernel=bwd_kernel,
        recurrent_kernel=bwd_recurrent_kernel,
        bias=bwd_bias,
        go_backwards=True,
        **shared,
    )
    return forward, _in_time_order(backward)


def bidirectional_gru(
    inputs,
    fwd_initial_state,
    bwd_initial_state,
    mask,
    fwd_kernel,
    fwd_recurrent_kernel,
    fwd_bias,
    bwd_kernel,
    bwd_recurrent_kernel,
    bwd_bias,
    activation,
    recurrent_activation,
    return_sequences=False,
    unroll=False,
    reset_after=True,
):
    """Two GRUs over the same sequences, one of them backward in time."""
    shared = {
        "mask": mask,
        "activation": activation,
        "recurrent_activation": recurrent_activation,
        "reset_after": reset_after,
    }
    forward = gru(
        inputs,
        fwd_initial_state,
        kernel=fwd_kernel,
        recurrent_kernel=fwd_recurrent_kernel,
        bias=fwd_bias,
        **shared,
    )
    backward = gru(
        inputs,
        bwd_initial_state,
        kernel=bwd_kernel,
        recurrent_kernel=bwd_recurrent_kernel,
        bias=bwd_bias,
        go_backwards=True,
        **shared,
    )
    return forward, _in_time_order(backward)


# -- any cell ----------------------------------------------------------------------------------------------------------
def rnn(
    step_function,
    inputs,
    initial_states,
    go_backwards=False,
    mask=None,
    constants=None,
    unroll=False,
    input_length=None,
    time_major=False,
    zero_output_for_mask=False,
    return_all_outputs=True,
):
    """A step function applied along time; gives (last output, outputs [B, T, ...], final states).

    step_function: (inputs of a step, states) -> (output, new states).
    mask: [B, T] or [B, T, 1]; where False, states stay and the output is the first state (zeros with
        `zero_output_for_mask`).
    The outputs come in the order of processing, so backward in time with `go_backwards`.
    """
    inputs = tree.map_structure(convert_to_tensor, inputs)
    initial_states = tree.map_structure(convert_to_tensor, initial_states)
    if mask is not None:
        mask = to_bool(mask)
    if not time_major and not constants:
        fused = _recognised(step_function, inputs, initial_states, go_backwards, mask, zero_output_for_mask)
        if fused is not None:
            return fused
    if not time_major:
        inputs = tree.map_structure(_swap_batch_and_time, inputs)
    if mask is not None:
        mask = mask if len(mask.shape) > 2 else knp.expand_dims(mask, -1)
        mask = mask if time_major else _swap_batch_and_time(mask)
    step = _masked_step(step_function, tuple(constants or ()), zero_output_for_mask)
    run = _unrolled if unroll else _scanned
    states, outputs = run(step, initial_states, inputs, mask, go_backwards)
    # In order of time; `-1` is a valid index of a symbolic length too.
    last = tree.map_structure(lambda t: t[0 if go_backwards else -1], outputs)
    if go_backwards:
        outputs = tree.map_structure(lambda t: ops.rev(t, axes=(0,)), outputs)
    if not return_all_outputs and unroll:
        outputs = tree.map_structure(lambda t: knp.expand_dims(t, 0), last)
    if not time_major:
        outputs = tree.map_structure(_swap_batch_and_time, outputs)
    return last, outputs, states


def _swap_batch_and_time(x: Tensor) -> Tensor:
    return ops.transpose(x, permutation=(1, 0, *range(2, len(x.shape))))


def _masked_step(step_function, constants: tuple, zero_output_for_mask: bool):
    """`(states, (inputs, mask or None)) -> (states, output)` that leaves the states alone where masked."""

    def kept(valid, new, old):
        return knp.where(knp.reshape(valid, (valid.shape[0],) + (1,) * (len(new.shape) - 1)), new, old)

    def step(states, x):
        current, valid = x
        given = states if not constants else (*states, *constants)
        output, new_states = step_function(current, given)
        new_states = tree.pack_sequence_as(states, tree.flatten(new_states))
        if valid is None:
            return new_states, output
        valid = knp.any(valid, axis=tuple(range(1, len(valid.shape))))
        if zero_output_for_mask:
            previous = knp.zeros_like(output)
        else:
            # The first state is the previous output; of stacked cells, that of the last one.
            previous = states[-1][0] if tree.is_nested(states[0]) else states[0]
        output = kept(valid, output, previous)
        return tree.map_structure(lambda new, old: kept(valid, new, old), new_states, states), output

    return step


def _scanned(step, states, inputs, mask, reverse: bool):
    if mask is None:
        return scan(lambda s, x: step(s, (x, None)), states, inputs, reverse=reverse)
    return scan(step, states, (inputs, mask), reverse=reverse)


def _unrolled(step, states, inputs, mask, reverse: bool):
    length = tree.flatten(inputs)[0].shape[0]
    if not length:
        raise ValueError("Unrolling requires a fixed number of timesteps.")
    slices = [unstack(x) for x in tree.flatten(inputs)]
    masks = unstack(mask) if mask is not None else [None] * length
    outputs = [None] * length
    for t in reversed(range(length)) if reverse else range(length):
        x = tree.pack_sequence_as(inputs, [s[t] for s in slices])
        states, outputs[t] = step(states, (x, masks[t]))
    return states, tree.map_structure(lambda *ts: knp.stack(ts), *outputs)


def _recognised(step_function, inputs, states, reverse: bool, mask, zero_output_for_mask: bool):
    """The result by the `rnn` primitive where the step is that of one of Keras' own cells, else None."""
    if getattr(step_function, "__qualname__", "") != _STEP or tree.is_nested(inputs):
        return None
    cells = sys.modules["keras.src.layers.rnn.rnn"]
    closure = dict(zip(step_function.__code__.co_freevars, step_function.__closure__ or ()))
    layer = closure["self"].cell_contents if "self" in closure else None
    if not isinstance(layer, cells.RNN) or len(inputs.shape) != 3:
        return None
    if mask is not None and len(mask.shape) != 2:
        return None
    cell = layer.cell
    options = closure["cell_kwargs"].cell_contents if "cell_kwargs" in closure else {}
    kind = _KINDS.get((type(cell).__module__, type(cell).__name__))
    if kind is None:
        return None
    if options.get("training"):
        if cell.recurrent_dropout:
            return None
        if cell.dropout:
            if getattr(cell, "implementation", 2) == 1:
                return None
            inputs = knp.multiply(inputs, knp.expand_dims(cell.get_dropout_mask(inputs[:, 0]), 1))
    try:
        return _fused(
            kind,
            cast(inputs, cell.compute_dtype),
            tree.flatten(states),
            cell.kernel,
            cell.recurrent_kernel,
            cell.bias,
            cell.activation,
            getattr(cell, "recurrent_activation", None),
            reset_after=getattr(cell, "reset_after", False),
            reverse=reverse,
            mask=mask,
            zero_output_for_mask=zero_output_for_mask,
        )
    except NotImplementedError:
        return None


_KINDS = {
    ("keras.src.layers.rnn.lstm", "LSTMCell"): "lstm",
    ("keras.src.layers.rnn.gru", "GRUCell"): "gru",
    ("keras.src.layers.rnn.simple_rnn", "SimpleRNNCell"): "simple",
}
