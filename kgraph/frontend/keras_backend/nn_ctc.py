"""Connectionist temporal classification (Graves et al., 2006): loss and decoding."""

from __future__ import annotations

import numpy as np
from keras.src import backend

from kgraph import ops
from kgraph.frontend.keras_backend import numpy as knp
from kgraph.frontend.keras_backend.control_flow import scan
from kgraph.frontend.keras_backend.core import cast
from kgraph.frontend.keras_backend.core import dense_tensor as convert_to_tensor
from kgraph.frontend.keras_backend.nn_activations import log_softmax
from kgraph.frontend.keras_backend.nn_losses import one_hot
from kgraph.frontend.keras_backend.numpy.common import Tensor, scalar

# Stands for log(0); finite, so that gradients stay finite.
_LOG_ZERO = -1e5


def ctc_loss(target, output, target_length, output_length, mask_index: int = 0) -> Tensor:
    """Negative log-likelihood of label sequences, summed over all alignments.

    target: [B, L] classes; output: [B, T, C] logits; lengths: [B]; mask_index: the blank. Gives [B].

    The forward recursion keeps two families of log-probabilities: `blank[n]`, the alignment so far has given n labels
    and ends in a blank, and `label[n]`, it ends in label n.
    """
    target = convert_to_tensor(target, dtype="int32")
    output = convert_to_tensor(output)
    output = cast(output, backend.result_type(output.dtype, "float32"))
    target_length = convert_to_tensor(target_length, "int32")
    output_length = convert_to_tensor(output_length, "int32")
    batch, steps, classes = output.shape
    labels = target.shape[1]
    dtype = output.dtype.name

    log_probabilities = log_softmax(output)
    blanks = log_probabilities[:, :, mask_index : mask_index + 1]
    emitted = knp.matmul(log_probabilities, knp.swapaxes(one_hot(target, classes, dtype=dtype), 1, 2))  # [B, T, L]
    same_as_next = cast(knp.equal(target[:, :-1], target[:, 1:]), dtype)
    repeat = knp.concatenate([same_as_next, knp.zeros((batch, 1), dtype)], axis=1)
    step_index = ops.iota(shape=(1, steps), dtype="int32", axis=1)
    padded = cast(knp.greater_equal(step_index, knp.expand_dims(output_length, 1)), dtype)

    def raise_blank(blank, score):
        """`blank[1:]` with further alignments of the given scores."""
        return knp.concatenate([blank[:, :1], knp.logaddexp(blank[:, 1:], score)], axis=1)

    def step(carry, x):
        blank_before, label = carry
        emit, emit_blank, pad = x
        # A label may be followed by the next one without a blank between, unless that is the same.
        blank = raise_blank(blank_before, label + _LOG_ZERO * repeat)
        new_label = knp.logaddexp(blank[:, :-1] + emit, label + emit)
        new_blank = raise_blank(blank + emit_blank, label + emit_blank + _LOG_ZERO * (1.0 - repeat))
        pad = knp.expand_dims(pad, 1)
        new_label = pad * label + (1.0 - pad) * new_label
        new_blank = pad * blank_before + (1.0 - pad) * new_blank
        return (new_blank, new_label), None

    start = knp.concatenate([knp.zeros((batch, 1), dtype), knp.full((batch, labels), _LOG_ZERO, dtype)], axis=1)
    xs = tuple(knp.swapaxes(t, 0, 1) for t in (emitted, blanks, padded))
    (blank, label), _ = scan(step, (start, knp.full((batch, labels), _LOG_ZERO, dtype)), xs)
    final = raise_blank(blank, label)
    return knp.negative(knp.sum(final * one_hot(target_length, labels + 1, dtype=dtype), axis=1))


# -- decoding ----------------------------------------------------------------------------------------------------------
def ctc_decode(
    inputs,
    sequence_lengths,
    strategy: str = "greedy",
    beam_width: int = 100,
    top_paths: int = 1,
    merge_repeated: bool = True,
    mask_index: int = 0,
):
    """Label sequences for [B, T, C] scores: ([paths, B, T] classes, -1 after the end; [B, paths] scores)."""
    inputs = convert_to_tensor(inputs)
    inputs = cast(inputs, backend.result_type(inputs.dtype, "float32"))
    sequence_lengths = convert_to_tensor(sequence_lengths, dtype="int32")
    if mask_index is None:
        mask_index = inputs.shape[-1] - 1
    if strategy == "greedy":
        return _greedy(inputs, sequence_lengths, merge_repeated, mask_index)
    if strategy != "beam_search":
        raise ValueError(f"Invalid strategy {strategy}. Supported values are 'greedy' and 'beam_search'.")
    log_probabilities = log_softmax(inputs)
    return ops.ctc_beam_search(
        log_probabilities,
        sequence_lengths,
        blank=int(mask_index) % inputs.shape[-1],
        beam_width=int(beam_width),
        top_paths=int(top_paths),
    )


def _greedy(inputs, sequence_lengths, merge_repeated: bool, mask_index: int):
    _, steps, _ = inputs.shape
    classes: Tensor = ops.argmax(inputs, axis=2, dtype="int32")
    scores = ops.reduce_max(inputs, axes=(2,), keepdims=False)
    blank = np.asarray(mask_index, "int32")
    index = ops.iota(shape=(1, steps), dtype="int32", axis=1)
    over = ops.ge(index, knp.expand_dims(sequence_lengths, 1))
    classes = ops.select(over, blank, classes)
    scores = ops.select(over, scalar(0, scores), scores)
    dropped = ops.eq(classes, blank)
    if merge_repeated:
        same = knp.equal(classes[:, 1:], classes[:, :-1])
        dropped = ops.logical_or(dropped, knp.pad(same, ((0, 0), (1, 0))))
    # A stable sort brings what is kept to the front, in order.
    key = ops.select(dropped, convert_to_tensor(steps, "int32"), index)
    order = ops.argsort(key, axis=1, stable=True, descending=False, dtype="int32")
    classes = ops.select(dropped, np.asarray(-1, "int32"), classes)
    classes = ops.take_along_axis(classes, order, axis=1)
    total = knp.negative(knp.sum(scores, axis=1, keepdims=True))
    return knp.expand_dims(classes, 0), total
