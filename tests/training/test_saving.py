"""Saving, loading, going on, and the same bits for the same seed."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers

import kgraph
from tests.models.training_runs import assert_equal_weights, classifier, data

OPTIONS = {"batch_size": 16, "shuffle": False, "verbose": 0}


def optimizers():
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 20, warmup_target=0.2, warmup_steps=3)
    return {
        "adam": keras.optimizers.Adam(0.01, amsgrad=True),
        "momentum": keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
        "schedule": keras.optimizers.RMSprop(schedule, centered=True),
        "ema": keras.optimizers.Lion(0.001, use_ema=True),
        "accumulation": keras.optimizers.AdamW(0.01, gradient_accumulation_steps=3),
        "scaled": keras.optimizers.LossScaleOptimizer(keras.optimizers.Adagrad(0.1), dynamic_growth_steps=2),
    }


@pytest.mark.parametrize("name", optimizers())
@pytest.mark.parametrize("kind", ["keras", "weights"])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tmp_path, name, kind):
    x, y = data(48)

    def make(seed=0):
        return classifier(optimizers()[name], seed=seed)

    # In two calls as well: at the end of each, averages of weights become the weights.
    whole, part = make(), make()
    for model in (whole, part):
        model.fit(x, y, epochs=2, **OPTIONS)
    whole.fit(x, y, initial_epoch=2, epochs=4, **OPTIONS)
    if kind == "keras":
        part.save(tmp_path / "model.keras")
        resumed = keras.models.load_model(tmp_path / "model.keras")
    else:
        part.save_weights(tmp_path / "model.weights.h5")
        resumed = make(seed=9)
        resumed.optimizer.build(resumed.trainable_variables)
        resumed.load_weights(tmp_path / "model.weights.h5")
    resumed.fit(x, y, initial_epoch=2, epochs=4, **OPTIONS)
    assert_equal_weights(whole, resumed)
    for a, b in zip(whole.optimizer.variables, resumed.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a, b)
    assert whole.evaluate(x, y, verbose=0) == resumed.evaluate(x, y, verbose=0)


def test_dropout_goes_on_where_its_seed_is_carried_over(tmp_path):
    """Keras' files hold no seeds of random layers; who wants the same masks after a load carries them over."""
    x, y = data(48)
    whole, part = (classifier("adam", dropout=0.4) for _ in range(2))
    for model in (whole, part):
        model.fit(x, y, epochs=1, **OPTIONS)
    whole.fit(x, y, epochs=1, **OPTIONS)
    part.save(tmp_path / "model.keras")
    resumed = keras.models.load_model(tmp_path / "model.keras")
    for layer, old in zip(resumed.layers, part.layers):
        if hasattr(layer, "seed_generator"):
            layer.seed_generator.state.assign(old.seed_generator.state)
    resumed.fit(x, y, epochs=1, **OPTIONS)
    assert_equal_weights(whole, resumed)


def test_shuffled_runs_go_on_with_the_seed_of_the_shuffling(tmp_path):
    x, y = data(48)
    options = {**OPTIONS, "shuffle": True}
    whole, part = classifier("adam"), classifier("adam")
    for model in (whole, part):
        keras.utils.set_random_seed(7)
        model.fit(x, y, epochs=1, **options)
        keras.utils.set_random_seed(8)
        if model is part:
            model.save(tmp_path / "model.keras")
            model = keras.models.load_model(tmp_path / "model.keras")
            # Builds the loss and the metrics, for which `fit` would take a batch and so shuffle once more.
            model.test_on_batch(x, y)
            keras.utils.set_random_seed(8)
        model.fit(x, y, epochs=1, **options)
        last = model
    assert_equal_weights(whole, last)


def everything():
    keras.utils.set_random_seed(0)
    tokens, image = keras.Input((7,), dtype="int32"), keras.Input((12, 12, 3))
    x = layers.Conv2D(16, 3, padding="same")(image)
    x = layers.BatchNormalization()(x)
    x = layers.MaxPooling2D()(layers.ReLU()(x))
    x = layers.SeparableConv2D(24, 3, activation="swish")(x)
    x = layers.SpatialDropout2D(0.2)(x)
    t = layers.Embedding(30, 16)(tokens)
    t = t + layers.MultiHeadAttention(2, 8, dropout=0.1)(t, t)
    t = layers.GRU(16)(layers.LayerNormalization()(t))
    joined = layers.Concatenate()([layers.GlobalAveragePooling2D()(x), t])
    model = keras.Model([tokens, image], layers.Dense(5)(layers.Dropout(0.3)(joined)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3, global_clipnorm=1.0), loss, metrics=["accuracy"])
    return model


def test_the_same_bits_for_any_number_of_threads():
    rng = np.random.default_rng(0)
    x = [rng.integers(0, 30, (40, 7)), rng.normal(size=(40, 12, 12, 3)).astype("float32")]
    y = rng.integers(0, 5, 40)
    runs = []
    try:
        for threads in (1, 2, 2):
            kgraph.set_num_threads(threads)
            model = everything()
            history = model.fit(x, y, batch_size=16, epochs=2, validation_split=0.2, verbose=0).history
            runs.append((model, history, model.predict(x, verbose=0)))
    finally:
        kgraph.set_num_threads(None)
    for model, history, outputs in runs[1:]:
        assert_equal_weights(runs[0][0], model)
        assert history == runs[0][1]
        np.testing.assert_array_equal(outputs, runs[0][2])


def test_metrics_continue_and_reset():
    x, y = data(32)
    model = classifier()
    model.fit(x, y, **OPTIONS)
    model.reset_metrics()
    assert all(not np.any(v) for m in model.metrics for v in m.variables)
    first = model.evaluate(x, y, verbose=0)
    assert model.evaluate(x, y, verbose=0) == first


def test_clones_and_copies_of_weights_are_independent():
    x, y = data(32)
    model = classifier()
    model.fit(x, y, **OPTIONS)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    held = [v.value for v in model.trainable_variables]
    kept = [h.copy() for h in held]
    model.fit(x, y, **OPTIONS)
    for h, k, c in zip(held, kept, clone.trainable_variables):
        np.testing.assert_array_equal(h, k)
        np.testing.assert_array_equal(c, k)


def test_a_custom_model_with_its_own_step_is_saved_and_loaded(tmp_path):
    @keras.saving.register_keras_serializable("kgraph_tests")
    class Scaled(keras.Model):
        def __init__(self, units=3, **kwargs):
            super().__init__(**kwargs)
            self.units = units
            self.dense = layers.Dense(units)

        def call(self, x):
            return self.dense(x) * 2

        def train_step(self, data):
            return {**super().train_step(data), "more": self.dense.kernel[0, 0]}

        def get_config(self):
            return {**super().get_config(), "units": self.units}

    x, y = data(32)
    keras.utils.set_random_seed(0)
    model = Scaled()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    assert "more" in model.fit(x, y, **OPTIONS).history
    model.save(tmp_path / "scaled.keras")
    loaded = keras.models.load_model(tmp_path / "scaled.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    for m in (model, loaded):
        m.fit(x, y, **OPTIONS)
    assert_equal_weights(model, loaded)
