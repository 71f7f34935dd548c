"""Training with code of the user's own, features of optimizers, and mixed precision."""

from __future__ import annotations

import sys

import keras
import numpy as np
import pytest
from keras import layers, ops

from kgraph.errors import UnsupportedError
from tests.models.training_runs import assert_equal_weights, classifier, data
from tests.oracle import comparison


# -- code of the user -------------------------------------------------------------------------------------------------
def test_overrides_losses_and_metrics_in_keras_ops():
    class Spread(keras.metrics.Metric):
        def __init__(self):
            super().__init__(name="spread")
            self.largest = self.add_weight(name="largest", initializer="zeros")

        def update_state(self, y, y_pred, sample_weight=None):
            self.largest.assign(ops.maximum(self.largest, ops.max(ops.abs(y_pred))))

        def result(self):
            return self.largest * 2

    class Own(keras.Model):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            loss = super().compute_loss(x, y, y_pred, sample_weight, training)
            return loss + 0.1 * ops.mean(ops.square(y_pred - ops.mean(x)))

        def train_step(self, data):
            logs = super().train_step(data)
            return {**logs, "twice": logs["loss"] * 2}

    def own_loss(y, y_pred):
        return ops.mean(ops.abs(ops.cast(y, y_pred.dtype) - y_pred), axis=-1)

    inputs = keras.Input((6,))
    x, y = data(20)
    results = []
    for eager in (False, True):
        keras.utils.set_random_seed(1)
        model = Own(inputs, layers.Dense(1)(inputs))
        model.compile("sgd", own_loss, metrics=[Spread()], run_eagerly=eager)
        history = model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0).history
        np.testing.assert_allclose(history["twice"][-1], 2 * history["loss"][-1], rtol=1e-6)
        results.append(history)
    for name, values in results[0].items():
        np.testing.assert_allclose(values, results[1][name], rtol=1e-4)


def test_added_losses_and_regularizers_reach_the_gradient():
    class Penalty(layers.Layer):
        def call(self, x):
            self.add_loss(0.5 * ops.sum(ops.square(x)))
            return x

    inputs = keras.Input((2,))
    dense = layers.Dense(1, use_bias=False, kernel_initializer="ones", kernel_regularizer=keras.regularizers.L2(0.25))
    model = keras.Model(inputs, Penalty()(dense(inputs)))
    model.compile(keras.optimizers.SGD(1.0), "mse")
    x = np.array([[1.0, 2.0]], "float32")
    loss = model.train_on_batch(x, np.array([[3.0]], "float32"))
    # At w = (1, 1) the output is 3: no error, a penalty of 4.5 with gradient 3 x, a regularization of 0.5 with w / 2.
    np.testing.assert_allclose(loss, 5.0, rtol=1e-6)
    np.testing.assert_allclose(dense.kernel[:, 0], [1 - 3 - 0.5, 1 - 6 - 0.5], rtol=1e-6)


def test_steps_of_other_frameworks_are_refused():
    class ForJax(keras.Sequential):
        def train_step(self, state, data):
            return {}, state

    model = ForJax([keras.Input((6,)), layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(UnsupportedError, match="train_step"):
        model.fit(*data(8), verbose=0)


def test_errors_of_misuse():
    x, y = data(8)
    model = keras.Sequential([keras.Input((6,)), layers.Dense(1)])
    with pytest.raises(ValueError, match="compile"):
        model.fit(x, y)
    model.compile("sgd")
    with pytest.raises(ValueError, match="No loss to compute"):
        model.fit(x, y, verbose=0)
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="not recognized"):
        model.evaluate(x, y, steps_of=2)
    model.trainable = False
    model.compile("sgd", "mse")
    before = model.get_weights()
    with pytest.warns(UserWarning, match="trainable weights"):
        model.fit(x, y, verbose=0)
    np.testing.assert_array_equal(model.get_weights()[0], before[0])


# -- optimizers and precision -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.Adam(0.01, global_clipnorm=0.5, use_ema=True, ema_momentum=0.9),
        lambda: keras.optimizers.SGD(0.05, gradient_accumulation_steps=2),
    ],
    ids=["ema", "accumulation"],
)
def test_features_of_optimizers_agree_with_eager_steps(optimizer):
    x, y = data(48)
    compiled, eager = classifier(optimizer()), classifier(optimizer(), run_eagerly=True)
    for model in (compiled, eager):
        model.fit(x, y, batch_size=16, shuffle=False, verbose=0)
    assert_equal_weights(compiled, eager, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    keras.utils.set_random_seed(0)
    with _policy(policy):
        model = keras.Sequential([keras.Input((6,)), layers.Dense(8, "relu"), layers.Dense(3, dtype="float32")])
    model.compile(
        keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True), auto_scale_loss=True
    )
    x, y = data(64)
    history = model.fit(x, y, batch_size=16, epochs=5, verbose=0)
    assert history.history["loss"][-1] < history.history["loss"][0]
    assert all(v.dtype == "float32" for v in model.trainable_variables)


class _policy:
    def __init__(self, name):
        self.name = name

    def __enter__(self):
        self.before = keras.config.dtype_policy()
        keras.config.set_dtype_policy(self.name)

    def __exit__(self, *exception):
        keras.config.set_dtype_policy(self.before)


def test_loss_scaling_skips_steps_that_overflow():
    inputs = keras.Input((2,))
    model = keras.Model(inputs, layers.Dense(1)(inputs))
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=2.0**120)
    model.compile(optimizer, "mse")
    before = model.get_weights()
    x, y = np.full((4, 2), 1e3, "float32"), np.full((4, 1), -1e3, "float32")
    model.train_on_batch(x, y)
    np.testing.assert_array_equal(model.get_weights()[0], before[0])
    assert float(optimizer.dynamic_scale) == 2.0**119
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1e-7), initial_scale=8.0), "mse")
    model.train_on_batch(x, y)
    plain = keras.Model(inputs, layers.Dense(1)(inputs))
    plain.set_weights(before)
    plain.compile(keras.optimizers.SGD(1e-7), "mse")
    plain.train_on_batch(x, y)
    assert_equal_weights(model, plain, rtol=1e-5)


def test_a_batch_size_that_the_code_needs_is_specialised():
    class ByRow(layers.Layer):
        def call(self, x):
            return ops.stack([x[i] * (i + 1.0) for i in range(x.shape[0])]) if isinstance(int(x.shape[0]), int) else x

        def compute_output_shape(self, shape):
            return shape

    inputs = keras.Input((6,))
    model = keras.Model(inputs, layers.Dense(1)(ByRow()(inputs)))
    model.compile("sgd", "mse")
    x, y = data(20)
    model.fit(x, y, batch_size=8, epochs=2, verbose=0)
    stats = model._compiled_train_step.stats()
    assert stats["compiles"] == 2
    assert "N" in stats["specialised"]


# -- the example ------------------------------------------------------------------------------------------------------
def test_the_example_reads_digits():
    pytest.importorskip("sklearn")
    sys.path.insert(0, str(comparison.ROOT / "examples"))
    import digits

    assert digits.main(verbose=0) >= 0.98


def test_new_state_is_held_by_nobody_else():
    class Keeper(layers.Layer):
        def build(self, shape):
            self.first, self.second, self.same = (
                self.add_weight(shape=(6,), initializer="ones", trainable=False, name=n) for n in ("a", "b", "c")
            )

        def call(self, x):
            self.first.assign(x[0])
            self.second.assign(x[0])
            self.same.assign(self.same)
            return x

    inputs = keras.Input((6,))
    keeper = Keeper()
    model = keras.Model(inputs, layers.Dense(1)(keeper(inputs)))
    model.compile("sgd", "mse")
    x, y = data(4)
    wanted = x[0].copy()
    model.train_on_batch(x, y)
    held = [v.value for v in keeper.variables]
    assert not any(np.shares_memory(a, b) for i, a in enumerate(held) for b in (*held[:i], x))
    x[:] = 7
    np.testing.assert_array_equal(keeper.first, wanted)
    np.testing.assert_array_equal(keeper.same, np.ones(6))


@pytest.mark.parametrize(
    "layer",
    [lambda: layers.SpectralNormalization(layers.Dense(4)), lambda: layers.GaussianNoise(0.5)],
    ids=["spectral", "noise"],
)
def test_layers_that_assign_state_agree_with_eager_steps(layer):
    x, y = data(24)
    models = []
    for eager in (False, True):
        keras.utils.set_random_seed(2)
        model = keras.Sequential([keras.Input((6,)), layer(), layers.Dense(1)])
        model.compile("sgd", "mse", run_eagerly=eager)
        model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
        models.append(model)
    assert_equal_weights(*models, rtol=1e-4, atol=1e-5)


def test_augmentations_that_keras_does_not_compile_are_compiled():
    images, labels = np.random.default_rng(0).uniform(0, 255, (7, 12, 12, 3)), np.arange(7) % 3
    histories = []
    for eager in (False, True):
        keras.utils.set_random_seed(5)
        model = keras.Sequential(
            [
                keras.Input((12, 12, 3)),
                layers.RandomRotation(0.1, seed=1),
                layers.RandomZoom(0.2, fill_mode="constant", seed=2),
                layers.RandomTranslation(0.1, 0.2, fill_mode="wrap", seed=3),
                layers.RandomShear(0.1, 0.2, interpolation="nearest", seed=4),
                layers.RandomPerspective(0.5, 0.3, seed=5),
                layers.Rescaling(1 / 255),
                layers.Flatten(),
                layers.Dense(3),
            ]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("sgd", loss, run_eagerly=eager)
        history = model.fit(images, labels, batch_size=3, epochs=2, shuffle=False, verbose=0)
        histories.append((history.history["loss"], model.evaluate(images, labels, verbose=0), model.predict(images)))
        assert (model._compiled_train_step is None) == eager
    for compiled, eager in zip(*histories, strict=True):
        np.testing.assert_allclose(compiled, eager, rtol=1e-3)


def test_layers_that_keras_does_not_compile_train_eagerly_with_a_warning():
    layer = layers.Dense(1, name="unfit")
    layer.supports_jit = False
    model = keras.Sequential([keras.Input((6,)), layer])
    model.compile("sgd", "mse")
    x, y = data(8)
    with pytest.warns(RuntimeWarning, match="unfit"):
        model.fit(x, y, verbose=0)
    assert model._compiled_train_step is None
