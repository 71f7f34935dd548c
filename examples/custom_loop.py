"""A training loop by hand: state in, state out, one compiled step, on scikit-learn's handwritten digits.

Run: python examples/custom_loop.py   (needs scikit-learn)
"""

from __future__ import annotations

# isort: off
import kgraph  # before keras: it becomes Keras' backend
import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits


def build() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(128, "relu"),
            layers.BatchNormalization(),
            layers.Dropout(0.2),
            layers.Dense(10),
        ]
    )


def make_step(model: keras.Model, optimizer: keras.optimizers.Optimizer, loss_fn, metric):
    """A compiled function `step(state, x, y) -> (loss, state)`."""

    def loss_of(trainable, rest, x, y):
        predicted, rest = model.stateless_call(trainable, rest, x, training=True)
        return loss_fn(y, predicted), (predicted, rest)

    differentiated = kgraph.value_and_grad(loss_of, has_aux=True)

    @kgraph.jit
    def step(state, x, y):
        trainable, rest, slots, counts = state
        (loss, (predicted, rest)), gradients = differentiated(trainable, rest, x, y)
        trainable, slots = optimizer.stateless_apply(slots, gradients, trainable)
        counts = metric.stateless_update_state(counts, y, predicted)
        return loss, (trainable, rest, slots, counts)

    return step


def main(epochs: int = 15, batch_size: int = 128) -> float:
    """Train, print the running accuracy, and give the accuracy on images that were held out."""
    keras.utils.set_random_seed(0)
    digits = load_digits()
    x, y = (digits.data / 16.0).astype("float32"), digits.target.astype("int32")
    order = np.random.default_rng(0).permutation(len(x))
    train, held_out = order[:1500], order[1500:]

    model, optimizer = build(), keras.optimizers.Adam(2e-3)
    optimizer.build(model.trainable_variables)
    metric = keras.metrics.SparseCategoricalAccuracy()
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    step = make_step(model, optimizer, loss_fn, metric)
    groups = (model.trainable_variables, model.non_trainable_variables, optimizer.variables, metric.variables)
    state = tuple([v.value for v in group] for group in groups)
    rng = np.random.default_rng(1)
    for epoch in range(epochs):
        rng.shuffle(train)
        for start in range(0, len(train), batch_size):
            rows = train[start : start + batch_size]
            loss, state = step(state, x[rows], y[rows])
        print(f"epoch {epoch + 1}: loss {float(loss):.4f}, accuracy {float(metric.stateless_result(state[3])):.4f}")
        state = (*state[:3], [np.zeros_like(c) for c in state[3]])

    for group, values in zip(groups, state):
        for variable, value in zip(group, values):
            variable.assign(value)
    accuracy = float((model.predict(x[held_out], verbose=0).argmax(-1) == y[held_out]).mean())
    print(f"accuracy on held-out digits {accuracy:.4f}")
    return accuracy


if __name__ == "__main__":
    main()
