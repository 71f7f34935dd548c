"""Training against Keras on JAX: curves of 50 steps, optimizers, losses and metrics; and that wrong gradients show."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from kgraph import ops
from kgraph.ir import PRIMITIVES
from tests.oracle import comparison, objective_runs, optimizer_runs, training, training_runs

needs_jax = pytest.mark.skipif(not comparison.JAX_PYTHON.exists(), reason="no environment with JAX (see README, Tests)")
OTHER_RUNS = [name for name in training_runs.RUNS if name not in training_runs.SHORT_RUNS]
OTHER_OPTIMIZERS = [case for case in optimizer_runs.CASES if case not in optimizer_runs.SHORT_CASES]
OTHER_OBJECTIVES = [case for case in objective_runs.CASES if case not in objective_runs.SHORT_CASES]
# Run -> a primitive whose gradient is made wrong, and by what factor: what numbers of the run's precision can show.
BROKEN = {
    **{f"convolution_1d-{optimizer}": ("tanh", 1.01) for optimizer in training_runs.OPTIMIZERS},
    "dense-sgd": ("gelu", 1.001),
    "mixed_precision-sgd": ("gelu", 1.05),
}
BROKEN_TOO = {
    "residual-adam": ("conv", 1.01),
    "transformer-adamw": ("attention", 1.01),
    "decoder-rmsprop": ("rms_norm", 1.01),
    "lstm-sgd": ("rnn", 1.001),
    "masked-adam": ("rnn", 1.01),
    "convolution-sgd": ("reduce_window", 1.001),
    "normalisations-sgd": ("group_norm", 1.01),
    "autoencoder-sgd": ("conv", 1.001),
}


@pytest.fixture(scope="module")
def by_jax() -> dict:
    """JAX's results for the ordinary tests, by one process per precision."""
    names = [*map(training_runs.stored_name, {*training_runs.SHORT_RUNS, *BROKEN})]
    names += map(optimizer_runs.stored_name, optimizer_runs.SHORT_CASES)
    return training.references([*names, *map(objective_runs.stored_name, objective_runs.SHORT_CASES)])


@pytest.fixture(scope="module")
def all_by_jax(by_jax) -> dict:
    """JAX's results for the long tests."""
    names = [*map(training_runs.stored_name, training_runs.RUNS)]
    for runs in (optimizer_runs, objective_runs):
        names += map(runs.stored_name, runs.CASES)
    return by_jax | training.references(names)


def assert_allowed(findings: list[training.Finding]) -> None:
    assert not [f for f in findings if not f.excess <= 1]


# -- curves -----------------------------------------------------------------------------------------------------------
def check_run(name: str, results: dict) -> None:
    assert_allowed(training.judge(name, training_runs.run(name), *results[training_runs.stored_name(name)]))


@needs_jax
@pytest.mark.parametrize("name", training_runs.SHORT_RUNS)
def test_fifty_steps(name, by_jax):
    check_run(name, by_jax)


@needs_jax
@pytest.mark.long
@pytest.mark.parametrize("name", OTHER_RUNS)
def test_fifty_steps_of_all_others(name, all_by_jax):
    check_run(name, all_by_jax)


def check_refused(name: str, primitive: str, factor: float, results: dict) -> None:
    record = PRIMITIVES[primitive]
    right = record.gradient

    def wrong(cotangents, inputs, outputs, **attrs):
        scale = lambda c: None if c is None else ops.mul(c, np.asarray(factor, np.dtype(str(c.dtype))))
        return tuple(scale(c) for c in right(cotangents, inputs, outputs, **attrs))

    # Records are frozen; this one is put right again after the run.
    object.__setattr__(record, "gradient", wrong)
    try:
        ours = training_runs.run(name)
    finally:
        object.__setattr__(record, "gradient", right)
    findings = training.judge(name, ours, *results[training_runs.stored_name(name)])
    assert max(f.excess for f in findings) > 1.5


@needs_jax
@pytest.mark.parametrize("name", BROKEN)
def test_a_slightly_wrong_gradient_is_refused(name, by_jax):
    check_refused(name, *BROKEN[name], by_jax)


@needs_jax
@pytest.mark.long
@pytest.mark.parametrize("name", BROKEN_TOO)
def test_other_wrong_gradients_are_refused(name, all_by_jax):
    check_refused(name, *BROKEN_TOO[name], all_by_jax)


# -- optimizers, losses, metrics --------------------------------------------------------------------------------------
def check_case(runs, case: str, results: dict) -> None:
    assert_allowed(training.judge_values(runs.run(case), *results[runs.stored_name(case)]))


@needs_jax
@pytest.mark.parametrize("case", optimizer_runs.SHORT_CASES)
def test_optimizers(case, by_jax):
    check_case(optimizer_runs, case, by_jax)


@needs_jax
@pytest.mark.long
@pytest.mark.parametrize("case", OTHER_OPTIMIZERS)
def test_options_of_all_other_optimizers(case, all_by_jax):
    check_case(optimizer_runs, case, all_by_jax)


@needs_jax
@pytest.mark.parametrize("case", objective_runs.SHORT_CASES)
def test_losses_and_metrics(case, by_jax):
    check_case(objective_runs, case, by_jax)


@needs_jax
@pytest.mark.long
@pytest.mark.parametrize("case", OTHER_OBJECTIVES)
def test_options_of_losses_and_metrics(case, all_by_jax):
    check_case(objective_runs, case, all_by_jax)


def test_every_class_is_tried():
    tried = {case.split("(")[0] for case in optimizer_runs.CASES}
    assert optimizer_runs.classes() == tried
    schedules = {c for c in vars(keras.optimizers.schedules) if c[0].isupper()} - {"LearningRateSchedule"}
    assert schedules == {name.split(",")[0] for name in optimizer_runs.SCHEDULES}
    for module, table in ((keras.losses, objective_runs.LOSSES), (keras.metrics, objective_runs.METRICS)):
        assert objective_runs.classes(module) - set(objective_runs.LEFT_OUT) == set(table)


def test_the_sum_of_values_in_a_step():
    """The metric `Sum` and the metrics of `add_metric`-like use: a train step that updates them itself."""

    class Summing(keras.Model):
        def __init__(self, **options):
            super().__init__(**options)
            self.total = keras.metrics.Sum(name="total")

        def train_step(self, data):
            logs = super().train_step(data)
            self.total.update_state(keras.ops.abs(data[0]))
            return logs | {"total": self.total.result()}

    inputs = keras.Input((3,))
    model = Summing(inputs=inputs, outputs=keras.layers.Dense(1)(inputs))
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).normal(size=(12, 3)).astype("float32")
    history = model.fit(x, x[:, :1], batch_size=5, verbose=0).history
    np.testing.assert_allclose(history["total"], [np.abs(x).sum()], rtol=1e-6)
