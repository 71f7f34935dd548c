"""Ten steps of every Keras optimizer and of its options on a small model, the same on any backend."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import keras
import numpy as np
from keras import layers, optimizers
from keras.optimizers import schedules

from tests.oracle import training_runs
from tests.oracle.training_runs import initial_weights

STEPS, BATCH = 10, 8
# Classes of keras.optimizers that are no optimizers of their own.
BASES = {"Optimizer": "the base class"}

# optimizer -> its own options, each set tried alone
VARIANTS: dict[str, list[dict]] = {
    "SGD": [{}, {"momentum": 0.8}, {"momentum": 0.8, "nesterov": True}],
    "RMSprop": [{}, {"centered": True}, {"momentum": 0.7, "rho": 0.8}, {"momentum": 0.5, "centered": True}],
    "Adam": [{}, {"amsgrad": True}, {"beta_1": 0.5, "beta_2": 0.9, "epsilon": 1e-3}],
    "AdamW": [{}, {"weight_decay": 0.2, "amsgrad": True}],
    "Adadelta": [{"learning_rate": 1.0}, {"learning_rate": 2.0, "rho": 0.8}],
    "Adagrad": [{}, {"initial_accumulator_value": 0.01, "epsilon": 1e-3}],
    "Adamax": [{}, {"beta_1": 0.5, "beta_2": 0.9}],
    "Adafactor": [{}, {"relative_step": False}, {"clip_threshold": 0.1, "beta_2_decay": -0.5}],
    "Nadam": [{}, {"beta_1": 0.5}],
    "Ftrl": [
        {},
        {"learning_rate_power": -0.3, "l1_regularization_strength": 0.01},
        {"l2_regularization_strength": 0.1, "l2_shrinkage_regularization_strength": 0.2, "beta": 0.3},
    ],
    "Lion": [{}, {"beta_1": 0.5, "beta_2": 0.8}],
    "Lamb": [{}, {"beta_1": 0.5}],
    "Muon": [{}, {"nesterov": False, "ns_steps": 3}, {"adam_weight_decay": 0.1, "momentum": 0.5}],
    "ScheduleFreeAdamW": [{}, {"warmup_steps": 4, "weight_decay": 0.1}],
}
# Options of every optimizer
OPTIONS: dict[str, dict] = {
    "clipnorm": {"clipnorm": 0.05},
    "global_clipnorm": {"global_clipnorm": 0.05},
    "clipvalue": {"clipvalue": 0.01},
    "weight_decay": {"weight_decay": 0.3},
    "use_ema": {"use_ema": True, "ema_momentum": 0.8},
    "ema_overwrite_frequency": {"use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 3},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 3},
    "loss_scale_factor": {"loss_scale_factor": 16.0},
}
SCHEDULES: dict[str, Callable] = {
    "ExponentialDecay": lambda: schedules.ExponentialDecay(0.05, 4, 0.5),
    "ExponentialDecay,staircase": lambda: schedules.ExponentialDecay(0.05, 4, 0.5, staircase=True),
    "PiecewiseConstantDecay": lambda: schedules.PiecewiseConstantDecay([3, 6], [0.05, 0.02, 0.01]),
    "PolynomialDecay": lambda: schedules.PolynomialDecay(0.05, 6, 0.01, power=2.0),
    "PolynomialDecay,cycle": lambda: schedules.PolynomialDecay(0.05, 4, 0.01, cycle=True),
    "InverseTimeDecay": lambda: schedules.InverseTimeDecay(0.05, 3, 0.5),
    "InverseTimeDecay,staircase": lambda: schedules.InverseTimeDecay(0.05, 3, 0.5, staircase=True),
    "CosineDecay": lambda: schedules.CosineDecay(0.05, 7, alpha=0.1),
    "CosineDecay,warmup": lambda: schedules.CosineDecay(0.0, 7, warmup_target=0.05, warmup_steps=3),
    "CosineDecayRestarts": lambda: schedules.CosineDecayRestarts(0.05, 3, t_mul=1.5, m_mul=0.8, alpha=0.1),
}


def _title(options: dict) -> str:
    return ",".join(f"{k}={v}" for k, v in options.items())


def _cases() -> dict[str, Callable]:
    """Case -> function that makes the optimizer. A step that is not finite is part of the data where it says so."""
    found: dict[str, Callable] = {}
    for name in VARIANTS:
        create = lambda options, kind=name: getattr(optimizers, kind)(**{"learning_rate": 0.01, **options})
        for options in VARIANTS[name]:
            found[f"{name}({_title(options)})"] = lambda c=create, o=options: c(o)
        for option in OPTIONS.values():
            options = {**VARIANTS[name][0], **option}
            found[f"{name}({_title(options)})"] = lambda c=create, o=options: c(o)
    for name, schedule in SCHEDULES.items():
        for kind in ("SGD", "Adam"):
            found[f"{kind}({name})"] = lambda s=schedule, k=kind: getattr(optimizers, k)(s())
    scaled = lambda inner, **options: optimizers.LossScaleOptimizer(inner, **options)
    found["LossScaleOptimizer(SGD)"] = lambda: scaled(optimizers.SGD(0.05), initial_scale=64.0)
    found["LossScaleOptimizer(Adam,growing)"] = lambda: scaled(
        optimizers.Adam(0.01), initial_scale=8.0, dynamic_growth_steps=2
    )
    found["LossScaleOptimizer(Adam,overflow)"] = lambda: scaled(optimizers.Adam(0.01, clipnorm=0.1), initial_scale=8.0)
    by_rank = lambda v: optimizers.Adam(0.01) if len(v.shape) == 2 else optimizers.SGD(0.05, momentum=0.5)
    found["MultiOptimizer(by_rank)"] = lambda: optimizers.MultiOptimizer(by_rank)
    return found


CASES = _cases()
# Every optimizer and every schedule once, every option on Adam.
SHORT_CASES = [
    *(f"{name}({_title(variants[0])})" for name, variants in VARIANTS.items()),
    *(f"Adam({_title(options)})" for options in [*VARIANTS["Adam"][1:], *OPTIONS.values()]),
    *(f"SGD({name})" for name in SCHEDULES),
    *(case for case in CASES if case.startswith(("LossScaleOptimizer", "MultiOptimizer"))),
]


def classes() -> set[str]:
    """Names of the optimizers in keras.optimizers."""
    members = vars(optimizers).items()
    return {name for name, c in members if inspect.isclass(c) and issubclass(c, optimizers.Optimizer)} - set(BASES)


def stored_name(case: str) -> str:
    """The name under which the results of a case are kept."""
    return f"optimizer.{case}@{training_runs.digest(__file__, training_runs.__file__)}"


def run(case: str, prepare: Callable = lambda x: x) -> dict[str, np.ndarray]:
    """Losses of the steps, weights, and the optimizer's own variables after `fit` over ten batches."""
    inputs = keras.Input((6,))
    x = layers.Dense(7, "tanh")(inputs)
    model = keras.Model(inputs, layers.Dense(3)(x))
    model.set_weights(initial_weights(model))
    rng = np.random.default_rng(3)
    x, y = (rng.normal(size=(STEPS * BATCH, size)).astype("float32") for size in (6, 3))
    overflow = "overflow" in case
    if overflow:
        x[4 * BATCH] = np.nan
    losses = []
    callback = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: losses.append(logs["loss"]))
    # JAX runs op by op: compiling so many steps would take it minutes.
    model.compile(CASES[case](), "mse", run_eagerly=keras.backend.backend() == "jax")
    model.fit(prepare(x), prepare(y), batch_size=BATCH, shuffle=False, callbacks=[callback], verbose=0)
    out = {f"weight.{i}": np.asarray(w) for i, w in enumerate(model.get_weights())}
    out.update({f"slot.{i}": np.asarray(v.value) for i, v in enumerate(model.optimizer.variables)})
    if not overflow:
        out["losses"] = np.array(losses, "float64")
    return out
