"""`kgraph.compile_step`: the training step of a Keras model as an object of its own, to be called and saved."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from kgraph.device_step import DeviceVariant
from kgraph.errors import CaptureError, InputError
from kgraph.report import Explanation, Profile, explain
from kgraph.train_step import CompiledStep, Variant


def compile_step(model, batch) -> TrainingStep:
    """The training step of a model, compiled for batches like this one.

    Args:
        model: a Keras model after `model.compile(...)`.
        batch: one batch as `fit` hands it to the step: `(x, y)`, or `(x, y, sample_weight)`. Nothing is trained on it;
            other batches may have another number of rows.

    Calls of the step change the model's variables as `fit` does. It can be saved with all of its state, and goes on
    from there where it is loaded, without Keras.
    Raises TypeError for what is no Keras model, InputError for a batch that is no tuple, CaptureError for a model that
    trains eagerly, and what `fit` raises where a model cannot be trained.
    """
    import keras

    from kgraph.frontend.keras_backend.batches import batch_of

    if not isinstance(model, keras.Model):
        raise TypeError(f"kgraph.compile_step takes a Keras model, got {model!r}")
    if not isinstance(batch, (tuple, list)):
        raise InputError(f"a batch is (x, y) or (x, y, sample_weight), got a {type(batch).__name__}")
    model._assert_compile_called("compile_step")
    data = batch_of(*batch)
    model._symbolic_build(data_batch=data)
    model.make_train_function()
    step = model._compiled_train_step
    if step is None:
        raise CaptureError(
            f"{model.name} trains eagerly, so there is no compiled step; compile it with jit_compile=True"
        )
    return TrainingStep(model, step, data)


class TrainingStep:
    """A training step as one native call: forward and backward pass, the optimizer's update, metrics."""

    def __init__(self, model, step: CompiledStep, batch: tuple):
        self.name = step.name
        self._model, self._step, self._batch = model, step, batch
        self._program()

    def _program(self) -> Variant | DeviceVariant:
        return self._step.prepare(self._batch)

    def __call__(self, batch) -> Any:
        """Run one step on `(x, y)` or `(x, y, sample_weight)`; gives the logs, metrics being running means."""
        from kgraph.frontend.keras_backend.batches import batch_of

        return self._step(batch_of(*batch))

    def save(
        self,
        path: str | os.PathLike,
        *,
        levels: Sequence[str] | None = None,
        rebuildable: bool = True,
        self_test: bool = True,
    ) -> int:
        """Write the step to a file that `kgraph.load` reads, with its state as it is now; gives the file's size.

        The state are the weights, the optimizer's variables, the metrics and the seeds. levels, rebuildable, self_test:
        as in `CompiledModel.save`.
        """
        from kgraph.artifact.save import save

        return save(self._saved(), path, levels=levels, rebuildable=rebuildable, self_test=self_test)

    def export(self, directory: str | os.PathLike, format: str = "c", **options):
        """Write the step, with its state as it is now, for programs without Python; gives the files' paths.

        format: "c", a shared and a static library with a C header. options: those of `kgraph.c_export.export`.
        """
        if format != "c":
            raise ValueError(f"format={format!r}: expected 'c'")
        from kgraph.c_export import export

        return export(self._saved(), directory, **options)

    def _saved(self):
        """The step as what is written of it."""
        from kgraph.artifact.models import saved_step

        model, program = self._model, self._program()
        metrics = model.metrics_variables
        kinds = {"weight": model.weights, "optimizer": model.optimizer.variables, "metric": metrics}
        return saved_step(self.name, program, kinds, self._values_after_reset(metrics))

    def _values_after_reset(self, metrics: Sequence) -> dict[int, Any]:
        """The value of each of the metrics' variables where an epoch begins, by the variable's `id`."""
        now = [v._value for v in metrics]
        try:
            self._model.reset_metrics()
            return {id(v): v._value for v in metrics}
        finally:
            for variable, value in zip(metrics, now):
                variable.assign(value)

    @property
    def graph(self):
        """The optimised graph of the step (prints as text)."""
        return self._program().compiled.optimised

    def explain(self) -> Explanation:
        """Per kernel and per Keras layer: what was fused, what was not and why, flops, bytes, host steps."""
        return explain(self.name, self._program().compiled)

    def profile(self, batch, repeats: int = 10) -> Profile:
        """Time per kernel and per Keras layer of steps on `(x, y)` or `(x, y, sample_weight)`; nothing is trained.

        Medians over `repeats` steps, on copies of the variables.
        """
        from kgraph.frontend.keras_backend.batches import batch_of

        return self._step.profile(batch_of(*batch), repeats)

    def stats(self) -> dict:
        """Counts: compiles, programs kept, compile seconds, why a size is fixed, and those of the last program."""
        return self._step.stats()

    def __repr__(self):
        return f"<kgraph.TrainingStep {self.name!r}>"
