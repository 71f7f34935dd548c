"""Every Keras loss and every Keras metric inside of training steps of a small model, the same on any backend."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import keras
import numpy as np
from keras import layers, losses, metrics

from tests.oracle import training_runs
from tests.oracle.training_runs import initial_weights

BATCH, BATCHES, CLASSES = 6, 4, 4
ROWS = BATCH * BATCHES

# What the targets and predictions of a loss or metric are.
REAL, POSITIVE, UNIT, SIGNED, BINARY, COLUMN, SPARSE, ONE_HOT, MULTI_HOT, RANKS, CTC = (
    "real positive unit signed binary column sparse one_hot multi_hot ranks ctc".split()
)
ACTIVATION = {
    POSITIVE: "softplus",
    UNIT: "softmax",
    SIGNED: "tanh",
    BINARY: "sigmoid",
    COLUMN: "sigmoid",
    SPARSE: "softmax",
    ONE_HOT: "softmax",
    MULTI_HOT: "sigmoid",
}

# class -> (kind of targets, options tried)
LOSSES: dict[str, tuple] = {
    "BinaryCrossentropy": (BINARY, {}, {"label_smoothing": 0.2}, {"from_logits": True}),
    "BinaryFocalCrossentropy": (BINARY, {}, {"apply_class_balancing": True, "gamma": 1.5}),
    "CTC": (CTC, {}),
    "CategoricalCrossentropy": (ONE_HOT, {}, {"label_smoothing": 0.1}, {"from_logits": True}, {"reduction": "sum"}),
    "CategoricalFocalCrossentropy": (ONE_HOT, {}, {"alpha": 0.4, "gamma": 1.0, "label_smoothing": 0.1}),
    "CategoricalGeneralizedCrossEntropy": (SPARSE, {}, {"q": 0.3}),
    "CategoricalHinge": (ONE_HOT, {}),
    "Circle": (SPARSE, {}, {"gamma": 3.0, "margin": 0.2}),
    "CosineSimilarity": (REAL, {}),
    "Dice": (MULTI_HOT, {}, {"axis": (1,)}),
    "Hinge": (SIGNED, {}),
    "Huber": (REAL, {}, {"delta": 0.3}),
    "KLDivergence": (UNIT, {}),
    "LogCosh": (REAL, {}, {"reduction": "sum"}),
    "MeanAbsoluteError": (REAL, {}),
    "MeanAbsolutePercentageError": (POSITIVE, {}),
    "MeanSquaredError": (REAL, {}, {"reduction": "sum"}, {"reduction": "mean_with_sample_weight"}),
    "MeanSquaredLogarithmicError": (POSITIVE, {}),
    "Poisson": (POSITIVE, {}),
    "SparseCategoricalCrossentropy": (SPARSE, {}, {"from_logits": True}, {"ignore_class": 1}),
    "SquaredHinge": (SIGNED, {}),
    "Tversky": (MULTI_HOT, {}, {"alpha": 0.3, "beta": 0.8}),
}
# class -> (kind of targets, options tried)
METRICS: dict[str, tuple] = {
    "AUC": (
        BINARY,
        {},
        {"curve": "PR", "num_thresholds": 20},
        {"summation_method": "minoring"},
        {"multi_label": True, "num_labels": CLASSES},
    ),
    "Accuracy": (RANKS, {}),
    "BinaryAccuracy": (BINARY, {}, {"threshold": 0.6}),
    "BinaryCrossentropy": (BINARY, {}, {"label_smoothing": 0.2}),
    "BinaryIoU": (COLUMN, {}, {"target_class_ids": [1], "threshold": 0.4}),
    "CategoricalAccuracy": (ONE_HOT, {}),
    "CategoricalCrossentropy": (ONE_HOT, {}),
    "CategoricalHinge": (ONE_HOT, {}),
    "ConcordanceCorrelation": (REAL, {}),
    "CosineSimilarity": (REAL, {}),
    "F1Score": (MULTI_HOT, {}, {"average": "macro", "threshold": 0.5}, {"average": "micro", "threshold": 0.4}),
    "FBetaScore": (MULTI_HOT, {"beta": 2.0}, {"average": "weighted", "threshold": 0.5}),
    "FalseNegatives": (BINARY, {}, {"thresholds": [0.3, 0.6]}),
    "FalsePositives": (BINARY, {}),
    "Hinge": (SIGNED, {}),
    "IoU": (RANKS, {"num_classes": CLASSES, "target_class_ids": [0, 2]}),
    "KLDivergence": (UNIT, {}),
    "LogCoshError": (REAL, {}),
    "MeanAbsoluteError": (REAL, {}),
    "MeanAbsolutePercentageError": (POSITIVE, {}),
    "MeanIoU": (RANKS, {"num_classes": CLASSES}),
    "MeanSquaredError": (REAL, {}),
    "MeanSquaredLogarithmicError": (POSITIVE, {}),
    "OneHotIoU": (ONE_HOT, {"num_classes": CLASSES, "target_class_ids": [1, 2]}),
    "OneHotMeanIoU": (ONE_HOT, {"num_classes": CLASSES}),
    "PearsonCorrelation": (REAL, {}),
    "Poisson": (POSITIVE, {}),
    "Precision": (MULTI_HOT, {}, {"thresholds": [0.2, 0.7]}, {"class_id": 1}, {"top_k": 2}),
    "PrecisionAtRecall": (BINARY, {"recall": 0.6, "num_thresholds": 30}),
    "R2Score": (REAL, {}, {"class_aggregation": "variance_weighted_average"}, {"class_aggregation": None}),
    "Recall": (MULTI_HOT, {}, {"top_k": 2, "class_id": 1}),
    "RecallAtPrecision": (BINARY, {"precision": 0.5, "num_thresholds": 30}),
    "RootMeanSquaredError": (REAL, {}),
    "SensitivityAtSpecificity": (BINARY, {"specificity": 0.5, "num_thresholds": 30}),
    "SparseCategoricalAccuracy": (SPARSE, {}),
    "SparseCategoricalCrossentropy": (SPARSE, {}, {"from_logits": True}),
    "SparseTopKCategoricalAccuracy": (SPARSE, {"k": 2}),
    "SpecificityAtSensitivity": (BINARY, {"sensitivity": 0.5, "num_thresholds": 30}),
    "SquaredHinge": (SIGNED, {}),
    "TopKCategoricalAccuracy": (ONE_HOT, {"k": 2}),
    "TrueNegatives": (BINARY, {}),
    "TruePositives": (BINARY, {}),
}
# Classes of keras.losses and keras.metrics without a case of their own, and why.
LEFT_OUT = {
    "Loss": "the base class",
    "Metric": "the base class",
    "Mean": "takes values instead of predictions; it is what tracks the loss in every run",
    "Sum": "takes values instead of predictions; a test of its own runs it",
    "MeanMetricWrapper": "the base class of most metrics",
}


def _cases() -> dict[str, tuple[str, Callable, str, dict]]:
    found = {}
    for part, module, table in (("loss", losses, LOSSES), ("metric", metrics, METRICS)):
        for name, (kind, *variants) in table.items():
            for options in variants:
                title = ",".join(f"{k}={v}" for k, v in options.items()).replace(" ", "")
                found[f"{part}-{name}({title})"] = part, getattr(module, name), kind, options
    return found


CASES = _cases()
# Every class once.
SHORT_CASES = list({case.split("(")[0]: case for case in reversed(CASES)}.values())[::-1]


def classes(module) -> set[str]:
    """Names of the classes of keras.losses or keras.metrics, one per class."""
    base = (losses.Loss, metrics.Metric)
    return {c.__name__ for c in vars(module).values() if inspect.isclass(c) and issubclass(c, base)}


def stored_name(case: str) -> str:
    """The name under which the results of a case are kept."""
    return f"objective.{case}@{training_runs.digest(__file__, training_runs.__file__)}"


class ClassIds(layers.Layer):
    """The index of the largest element as a float; its derivative is that of the sum."""

    def call(self, x):
        smooth = keras.ops.sum(x, -1)
        ids = keras.ops.cast(keras.ops.argmax(x, -1), x.dtype)
        return ids + (smooth - keras.ops.stop_gradient(smooth))


def targets(kind: str) -> np.ndarray:
    rng = np.random.default_rng(5)
    values = rng.normal(size=(ROWS, CLASSES)).astype("float32")
    return {
        REAL: values,
        POSITIVE: np.abs(values) + np.float32(0.2),
        UNIT: np.exp(values) / np.exp(values).sum(-1, keepdims=True),
        SIGNED: np.sign(values),
        BINARY: (values > 0).astype("float32"),
        COLUMN: (values[:, :1] > 0).astype("float32"),
        MULTI_HOT: (values > 0).astype("float32"),
        SPARSE: values.argmax(-1).astype("int32"),
        RANKS: values.argmax(-1).astype("int32"),
        ONE_HOT: np.eye(CLASSES, dtype="float32")[values.argmax(-1)],
        CTC: rng.integers(1, CLASSES, (ROWS, 3)).astype("int32"),
    }[kind]


def run(case: str, prepare: Callable = lambda x: x) -> dict[str, np.ndarray]:
    """Logs after every batch of one epoch with sample weights, logs of `evaluate`, and the weights at the end."""
    part, create, kind, options = CASES[case]
    logits = options.get("from_logits") or kind == CTC
    inputs = keras.Input((7, 5) if kind == CTC else (5,))
    x = layers.Dense(6, "tanh")(inputs)
    outputs = layers.Dense(1 if kind == COLUMN else CLASSES, None if logits else ACTIVATION.get(kind))(x)
    model = keras.Model(inputs, ClassIds()(outputs) if kind == RANKS else outputs)
    model.set_weights(initial_weights(model))
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(ROWS, *inputs.shape[1:])).astype("float32"), targets(kind)
    weights = rng.uniform(0.5, 2.0, ROWS).astype("float32")
    if part == "loss":
        how = {"loss": create(**options)}
    else:
        # The loss only moves the weights.
        how = {"loss": "sparse_categorical_crossentropy" if kind == SPARSE else "mse"}
        how["metrics"], how["weighted_metrics"] = ([create(**options, name=name)] for name in ("plain", "weighted"))
    seen = []
    callback = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(dict(logs)))
    # JAX runs op by op: compiling so many steps would take it minutes.
    model.compile("sgd", run_eagerly=keras.backend.backend() == "jax", **how)
    data = {"x": prepare(x), "y": prepare(y), "sample_weight": prepare(weights)}
    model.fit(**data, batch_size=BATCH, shuffle=False, callbacks=[callback], verbose=0)
    logs = model.evaluate(**data, batch_size=5, verbose=0, return_dict=True)
    out = {f"fit.{key}": np.array([np.asarray(log[key], "float64") for log in seen]) for key in seen[0]}
    out.update({f"evaluate.{key}": np.asarray(value, "float64") for key, value in logs.items()})
    return out | {f"weight.{i}": np.asarray(w) for i, w in enumerate(model.get_weights())}
