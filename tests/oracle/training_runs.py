"""Training runs of 50 steps, the same on any backend: every model of `training_models` with every optimizer here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np

from tests.oracle import training_models

STEPS = 50
OPTIMIZERS: dict[str, Callable] = {
    "sgd": lambda: keras.optimizers.SGD(0.02, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.002),
    "adamw": lambda: keras.optimizers.AdamW(keras.optimizers.schedules.CosineDecay(0.002, 60), weight_decay=0.02),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.001),
    "lion": lambda: keras.optimizers.Lion(0.0002),
}
# What one element whose sign is a matter of rounding can be away from the reference after one step of Lion.
LION_STEP = 2 * 0.0002
RUNS = [f"{model}-{optimizer}" for model in training_models.MODELS for optimizer in OPTIMIZERS]
# Twelve models, every optimizer twice or more.
SHORT_MODELS = (
    "dense residual transformer decoder lstm gru autoencoder two_inputs masked mixed_precision separable convolution_1d"
).split()
SHORT_RUNS = [f"{model}-{list(OPTIMIZERS)[i % len(OPTIMIZERS)]}" for i, model in enumerate(SHORT_MODELS)]


def digest(*files: str) -> str:
    """A short digest of source files: results that were made by others are not taken for theirs."""
    return hashlib.sha256(b"".join(Path(f).read_bytes() for f in files)).hexdigest()[:10]


def stored_name(name: str) -> str:
    """The name under which the results of a run are kept."""
    return f"training.{name}@{digest(__file__, training_models.__file__)}"


def initial_weights(model: keras.Model) -> list[np.ndarray]:
    """Reproducible values for all weights: normal ones of a variance by fan-in; vectors as they are initialised."""
    rng, values = np.random.default_rng(7), []
    for variable in model.weights:
        value = np.asarray(variable)
        if value.ndim >= 2 and value.dtype.kind == "f":
            fan_in = np.prod(value.shape[: -2 if "depthwise" in variable.path else -1])
            value = rng.normal(size=value.shape) * min(0.5, float(fan_in) ** -0.5)
        # Rounded once to float32, so that runs of any precision begin at the same numbers.
        values.append(value.astype("float32") if value.dtype.kind == "f" else value)
    return values


def run(name: str, prepare: Callable = lambda x: x) -> dict[str, np.ndarray]:
    """One run: the curve of every logged number (`log.<name>`) and every weight before and after (`weight.<index>`).

    prepare: applied to every array of the data.
    """
    model_name, optimizer = name.split("-")
    task = training_models.MODELS[model_name]()
    model = task.model
    model.set_weights(initial_weights(model))
    out = {f"initial.{i}": np.asarray(w) for i, w in enumerate(model.get_weights())}
    model.compile(OPTIMIZERS[optimizer](), task.loss, metrics=task.metrics, **task.options)
    x, y = (keras.tree.map_structure(prepare, part) for part in (task.x, task.y))
    logs = [model.train_on_batch(x, y, return_dict=True) for _ in range(STEPS)]
    out.update({f"log.{key}": np.array([np.asarray(log[key], "float64") for log in logs]) for key in logs[0]})
    out.update({f"weight.{i}": np.asarray(w) for i, w in enumerate(model.get_weights())})
    return out
