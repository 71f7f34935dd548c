"""One case of training in an engine's process: a Keras model with Adam, timed through `fit`.

Run by `benchmarks.train`, inside of `worker.py`.
"""

from __future__ import annotations

import time

import models
import numpy as np

# The data set of a case: at most so many batches, and so many bytes.
MAX_BATCHES = 1000
MAX_DATA_BYTES = 32 << 20
# Epochs of one round: each gives one sample.
EPOCHS_PER_ROUND = 3
# Steps whose losses are compared between engines, all on one batch.
CHECKED_STEPS = 5
# Steps of the warm-up epoch, fewer where they would take more than a second.
WARM_UP_STEPS = 10

# What `compile` is told; an engine that is not here decides for itself.
JIT_COMPILE = {"tensorflow": False, "tensorflow-xla": True, "torch": False, "torch-compile": True}


class Training:
    """A model of a case, compiled and taken through its first steps and one warm-up epoch."""

    def __init__(self, engine: str, case: dict):
        if engine == "kgraph":
            import kgraph  # noqa: F401 - makes itself a backend of Keras

        import keras

        class EpochTimes(keras.callbacks.Callback):
            """Seconds of every epoch of a `fit`."""

            def __init__(self):
                super().__init__()
                self.seconds: list[float] = []

            def on_epoch_begin(self, epoch, logs=None):
                self._start = time.perf_counter()

            def on_epoch_end(self, epoch, logs=None):
                self.seconds.append(time.perf_counter() - self._start)

        self._clock = EpochTimes
        name, self.batch = case["model"], case["batch"]
        self.model = models.build(name)
        classes = self.model.output_shape[-1]
        row_bytes = models.example_inputs(name, 1).nbytes
        batches = max(2, min(MAX_BATCHES, MAX_DATA_BYTES // (row_bytes * self.batch)))
        self.x, self.y = models.training_data(name, classes, batches * self.batch)
        start = time.perf_counter()
        self.model.compile(optimizer="adam", loss=models.loss(name), jit_compile=JIT_COMPILE.get(engine, "auto"))
        losses = self._fit(1, 1, shuffle=False)[0]
        first_step = time.perf_counter() - start
        more, seconds = self._fit(1, CHECKED_STEPS - 1, shuffle=False)
        losses += more
        self.batches = batches
        steps = max(2, min(batches, WARM_UP_STEPS, int(1.0 / min(seconds))))
        self.seconds_per_step = self._fit(steps, 1)[1][0] / steps
        self.loaded = {"first_step_s": first_step, "losses": losses, "warm_up_ms": self.seconds_per_step * 1e3}

    def _fit(self, steps: int, epochs: int, **options) -> tuple[list[float], list[float]]:
        """Losses and seconds of epochs of `steps` steps."""
        rows = steps * self.batch
        clock = self._clock()
        history = self.model.fit(
            self.x[:rows],
            self.y[:rows],
            batch_size=self.batch,
            epochs=epochs,
            verbose=0,
            callbacks=[clock],
            **options,
        )
        return [float(loss) for loss in history.history["loss"]], clock.seconds

    def time(self, seconds: float) -> dict:
        """Milliseconds per step, one sample for each epoch of a round that takes about `seconds`.

        The last epoch before gives the number of steps; a case whose single step takes long runs longer.
        """
        wanted = int(seconds / EPOCHS_PER_ROUND / max(self.seconds_per_step, 1e-6))
        steps = max(2, min(self.batches, wanted))
        epochs = max(EPOCHS_PER_ROUND if wanted >= 2 else 1, round(seconds / (steps * self.seconds_per_step)))
        _, times = self._fit(steps, epochs)
        self.seconds_per_step = float(np.median(times)) / steps
        return {"ms": [t / steps * 1e3 for t in times], "steps": steps}

    def program(self) -> dict:
        """Counts of kgraph's compiled step: kernels, steps, bytes of the arena."""
        return {"program": self.model._compiled_train_step.stats()}


__all__ = ["Training"]
