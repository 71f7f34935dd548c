"""Sequences of many lengths: a recurrent network learns whether brackets are balanced.

Every batch is padded to its own longest sequence only. The first batch gets a program of its own, the next length one
in which the length is symbolic, which all further batches run in.

Run: python examples/sequences.py
"""

from __future__ import annotations

# isort: off
import kgraph  # noqa: F401  (before keras: it becomes Keras' backend)
import keras
import numpy as np
from keras import layers

PAD, OPEN, CLOSE = 0, 1, 2


class Brackets(keras.utils.PyDataset):
    """Batches of bracket sequences of similar length, with 1 for those that are balanced."""

    def __init__(self, batches: int, batch_size: int, longest: int, seed: int, **options):
        super().__init__(**options)
        rng = np.random.default_rng(seed)
        rows = [self.sequence(rng, longest) for _ in range(batches * batch_size)]
        rows.sort(key=len)
        self.batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        rng.shuffle(self.batches)

    @staticmethod
    def sequence(rng, longest: int) -> list[int]:
        """A balanced sequence; every second one with one bracket turned around."""
        out, depth = [], 0
        for _ in range(int(rng.integers(4, longest + 1))):
            bracket = OPEN if depth == 0 or rng.random() < 0.5 else CLOSE
            depth += 1 if bracket == OPEN else -1
            out.append(bracket)
        out += [CLOSE] * depth
        if rng.random() < 0.5:
            i = int(rng.integers(len(out)))
            out[i] = OPEN + CLOSE - out[i]
        return out

    @staticmethod
    def balanced(sequence: list[int]) -> bool:
        depth = 0
        for bracket in sequence:
            depth += 1 if bracket == OPEN else -1
            if depth < 0:
                return False
        return depth == 0

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        rows = self.batches[index]
        x = np.full((len(rows), max(map(len, rows))), PAD, "int32")
        for row, sequence in zip(x, rows):
            row[: len(sequence)] = sequence
        return x, np.array([self.balanced(sequence) for sequence in rows], "float32")[:, None]


def build() -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            layers.Embedding(3, 8, mask_zero=True),
            layers.GRU(32),
            layers.Dense(1),
        ]
    )
    model.compile(
        keras.optimizers.Adam(5e-3),
        keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=[keras.metrics.BinaryAccuracy(threshold=0.0)],
    )
    return model


def main(epochs: int = 12, longest: int = 24, verbose: int | str = "auto") -> float:
    """Train, print, and give the accuracy on sequences that were not seen."""
    keras.utils.set_random_seed(0)
    model = build()
    train = Brackets(60, 64, longest, seed=0)
    lengths = {x.shape[1] for x, _ in (train[i] for i in range(len(train)))}
    model.fit(train, epochs=epochs, verbose=verbose)
    _, accuracy = model.evaluate(Brackets(10, 64, longest, seed=1), verbose=0)
    print(f"{len(lengths)} lengths; accuracy on new sequences {accuracy:.4f}")
    return accuracy


if __name__ == "__main__":
    main()
