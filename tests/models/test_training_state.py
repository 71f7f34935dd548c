"""The state of a compiled training step: updated in place, never under somebody's hands; memory near its bound."""

import keras
import numpy as np
import pytest

from benchmarks import models

RNG = np.random.default_rng(0)


def data(model, rows: int = 8):
    x = [RNG.random((rows, *[s or 12 for s in i.shape[1:]])).astype("float32") for i in model.inputs]
    x = [RNG.integers(0, 50, a.shape).astype("int32") if i.dtype == "int32" else a for a, i in zip(x, model.inputs)]
    y = RNG.random((rows, *model.output_shape[1:])).astype("float32")
    return x[0], y


def trained(model, steps: int = 2, optimizer="adam"):
    """The model after some steps, its compiled step, and a batch."""
    x, y = data(model)
    model.compile(optimizer=optimizer, loss="mse")
    for _ in range(steps):
        model.train_on_batch(x, y)
    return model._compiled_train_step, x, y


def small_models() -> dict:
    layers = keras.layers

    def convolutional():
        return keras.Sequential(
            [
                keras.Input((12, 12, 3)),
                layers.Conv2D(8, 3, use_bias=False),
                layers.BatchNormalization(),
                layers.ReLU(),
                layers.MaxPooling2D(),
                layers.Flatten(),
                layers.Dropout(0.3),
                layers.Dense(4),
            ]
        )

    def recurrent():
        return keras.Sequential([keras.Input((9, 5)), layers.LSTM(7), layers.Dense(3)])

    def attentive():
        return models.transformer(blocks=1, width=16, heads=2, feed_forward=32, tokens=8, vocabulary=50)

    return {"dense": models.tiny_mlp, "convolutional": convolutional, "recurrent": recurrent, "attentive": attentive}


@pytest.mark.parametrize("name", small_models())
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "lion"])
def test_all_weights_and_slots_are_updated_in_place(name, optimizer):
    model = small_models()[name]()
    _, x, y = trained(model, optimizer=optimizer)
    state = [*model.trainable_variables, *model.optimizer.variables]
    before = [id(v._value) for v in state]
    values = [v.numpy() for v in model.trainable_variables]
    model.train_on_batch(x, y)
    moved = [v.path for v, old in zip(state, before) if id(v._value) != old]
    # Plain gradient descent ends in the kernel that sums a bias' gradient, which reads the old value until it is done.
    summed = ("bias", "beta", "gamma", "position_embedding") if optimizer == "sgd" else ()
    assert [path for path in moved if not any(word in path for word in ("learning_rate", *summed))] == []
    assert all((v.numpy() != old).any() for v, old in zip(model.trainable_variables, values))


def test_arrays_that_somebody_holds_do_not_change():
    model = models.tiny_mlp()
    _, x, y = trained(model)
    kernel = model.layers[0].kernel
    held, view = kernel.value, model.layers[1].kernel.value[3:5]
    copies = held.copy(), view.copy()
    weights = model.get_weights()
    kept = [w.copy() for w in weights]
    model.train_on_batch(x, y)
    model.train_on_batch(x, y)
    np.testing.assert_array_equal(held, copies[0])
    np.testing.assert_array_equal(view, copies[1])
    for w, k in zip(weights, kept):
        np.testing.assert_array_equal(w, k)
    assert (kernel.value != held).any()


def test_predictions_between_steps_see_the_new_weights():
    model = models.tiny_mlp()
    _, x, y = trained(model)
    for _ in range(3):
        np.testing.assert_allclose(model.predict(x, verbose=0), model(x), rtol=1e-5, atol=1e-6)
        model.train_on_batch(x, y)


def test_in_place_steps_give_the_same_bits_as_steps_on_copies():
    def run(hold: bool):
        keras.utils.set_random_seed(3)
        model = small_models()["convolutional"]()
        keras.utils.set_random_seed(4)
        rng = np.random.default_rng(1)
        x, y = rng.random((6, 12, 12, 3)).astype("float32"), rng.random((6, 4)).astype("float32")
        model.compile(optimizer="adamw", loss="mse")
        held = []
        for _ in range(5):
            model.train_on_batch(x, y)
            if hold:
                held.append([v._value for v in model.variables + model.optimizer.variables])
        return model.get_weights()

    for a, b in zip(run(False), run(True)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", small_models())
def test_arena_of_a_step_is_near_the_bound_of_liveness(name):
    step, _, _ = trained(small_models()[name](), steps=1)
    ((variant),) = step._variants.values()
    for rows in (1, 8, 100):
        binding = variant.program.bind({"N": rows})
        assert binding.arena_bytes <= 1.2 * binding.storage.arena_bound
