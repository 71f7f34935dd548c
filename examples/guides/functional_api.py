"""Graphs of layers: several inputs and outputs, shared layers, skipped connections, a model inside of a model.

Run: python examples/guides/functional_api.py
"""

from __future__ import annotations

# isort: off
import kgraph  # (before keras: it becomes Keras' backend)
import keras
import numpy as np
from keras import layers

WORDS, LENGTH = 200, 12


def tickets(rows: int, seed: int = 0):
    """Support tickets: title and body as word numbers, tags; how urgent they are, and who should answer."""
    rng = np.random.default_rng(seed)
    department = rng.integers(0, 3, rows)
    # Each department has words of its own; low numbers are urgent words.
    words = rng.integers(21, WORDS - 2, (2, rows, LENGTH)) // 3 * 3 + department[None, :, None]
    urgent = rng.random(rows) < 0.4
    words[0, urgent, :3] = rng.integers(0, 20, (int(urgent.sum()), 3))
    tags = rng.integers(0, 2, (rows, 6)).astype("float32")
    inputs = {"title": words[0].astype("int32"), "body": words[1].astype("int32"), "tags": tags}
    return inputs, {"priority": urgent.astype("float32")[:, None], "department": department.astype("int32")}


def build() -> keras.Model:
    title = keras.Input((None,), dtype="int32", name="title")
    body = keras.Input((None,), dtype="int32", name="body")
    tags = keras.Input((6,), name="tags")
    embed = layers.Embedding(WORDS, 16)  # one layer, called twice: the texts share their words' vectors
    reader = encoder()
    x = layers.concatenate([reader(embed(title)), reader(embed(body)), tags])
    x = layers.Dense(32, activation="relu")(x)
    x = layers.add([x, layers.Dense(32, activation="relu")(x)])
    priority = layers.Dense(1, activation="sigmoid", name="priority")(x)
    department = layers.Dense(3, name="department")(x)
    return keras.Model(
        {"title": title, "body": body, "tags": tags}, {"priority": priority, "department": department}, name="tickets"
    )


def encoder() -> keras.Model:
    """A model that is used like a layer."""
    sequence = keras.Input((None, 16))
    x = layers.Conv1D(32, 3, padding="same", activation="relu")(sequence)
    return keras.Model(sequence, layers.GlobalMaxPooling1D()(x), name="encoder")


def main(verbose: int = 1) -> tuple[float, float]:
    """Train, and give the accuracy of both outputs on new tickets."""
    keras.utils.set_random_seed(0)
    model = build()
    model.compile(
        "adam",
        loss={
            "priority": keras.losses.BinaryCrossentropy(),
            "department": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        },
        loss_weights={"priority": 1.0, "department": 0.5},
    )
    x, y = tickets(3000)
    model.fit(x, y, batch_size=64, epochs=6, verbose=verbose)
    test_x, test_y = tickets(500, seed=1)
    answer = kgraph.compile(model)(test_x)
    urgent = float(((answer["priority"] > 0.5) == test_y["priority"]).mean())
    department = float((answer["department"].argmax(-1) == test_y["department"]).mean())
    print(f"priority {urgent:.3f}, department {department:.3f}")
    return urgent, department


if __name__ == "__main__":
    main()
