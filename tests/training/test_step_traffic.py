"""Bytes that the kernels of a training step move around a normalisation, in multiples of the activation's size."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

from kgraph.dims import evaluate
from kgraph.report import kernel_rows

ROWS, SIZE, CHANNELS = 4, 24, 48
ACTIVATION = ROWS * SIZE * SIZE * CHANNELS * 4


def step_rows(model):
    rng = np.random.default_rng(0)
    model.compile(optimizer="adam", loss="sparse_categorical_crossentropy")
    model.train_on_batch(rng.normal(size=(ROWS, SIZE, SIZE, 3)), rng.integers(0, 3, ROWS))
    (variant,) = model._compiled_train_step._variants.values()
    return [(row, evaluate(row.bytes, {"N": ROWS})) for row in kernel_rows(variant.compiled)]


def moved(rows, *labels: str) -> float:
    """Bytes of the kernels whose name holds one of the labels, in activations."""
    return sum(size for row, size in rows if any(label in row.label for label in labels)) / ACTIVATION


@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_batch_normalisation(activation):
    model = keras.Sequential(
        [
            keras.Input((SIZE, SIZE, 3)),
            layers.Conv2D(CHANNELS, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.Activation(activation),
            layers.Conv2D(CHANNELS, 3, padding="same"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, activation="softmax"),
        ]
    )
    rows = step_rows(model)
    around = [(row, size) for row, size in rows if "conv" not in row.label and "pack" not in row.label]
    around = [(row, size) for row, size in around if size > ACTIVATION / 2 and "batch_normalization" in str(row.layers)]
    # Read for the statistics; read, written and its mask written; read with the cotangent for the sums over the batch;
    # the same again with the cotangent of the operand written.
    assert moved(around, "moments") == pytest.approx(1, abs=0.1)
    assert sum(size for _, size in around) / ACTIVATION <= 1 + 2.25 + 2 + 3 + 0.1


def test_layer_normalisation():
    model = keras.Sequential(
        [
            keras.Input((SIZE, SIZE, 3)),
            layers.Dense(CHANNELS),
            layers.LayerNormalization(),
            layers.Dense(CHANNELS),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, activation="softmax"),
        ]
    )
    rows = [(r, s) for r, s in step_rows(model) if s > ACTIVATION / 2 and "layer_normalization" in str(r.layers)]
    rows = [(r, s) for r, s in rows if "gemm" not in r.label]
    # Forward 2; then the statistics 1, the sums along the rows 2, those over the batch 2, the operand's cotangent 3.
    assert sum(size for _, size in rows) / ACTIVATION <= 2 + 1 + 2 + 2 + 3 + 0.3
