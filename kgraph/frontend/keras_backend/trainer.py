"""The part of Keras' Model that evaluates and predicts, with a compiled forward pass. Training is not there yet."""

from __future__ import annotations

import warnings

import numpy as np
from keras.src import backend, tree
from keras.src import callbacks as callbacks_module
from keras.src.backend.common import standardize_dtype
from keras.src.backend.common.keras_tensor import KerasTensor
from keras.src.trainers import trainer as base_trainer
from keras.src.trainers.data_adapters import data_adapter_utils
from keras.src.trainers.epoch_iterator import EpochIterator
from keras.src.utils import traceback_utils
from keras.src.utils.python_utils import pythonify_logs

from kgraph.errors import KGraphError, UnsupportedError
from kgraph.frontend.keras_backend.core import is_tensor

_NO_TRAINING = "training on kgraph is not there yet; train with another Keras backend and load the weights here"


def _is_bare(model) -> bool:
    """Whether a built model knows the shapes of its inputs neither from Functional inputs nor from its building."""
    functional = getattr(model, "_functional", None) or model
    return not hasattr(functional, "_inputs_struct") and not getattr(model, "_build_shapes_dict", None)


class NumpyTrainer(base_trainer.Trainer):
    """`evaluate` and `predict` of Keras models (the name is the one Keras imports).

    The forward pass is compiled at the first batch (`kgraph.compile`), unless the model was compiled with
    `run_eagerly=True` or `jit_compile=False`, overrides the step, or cannot be captured; a warning then says why, and
    it runs eagerly on the reference implementations.
    """

    def __init__(self):
        super().__init__()
        self.train_function = None
        self.test_function = None
        self.predict_function = None
        self._compiled_forward = None

    # -- the forward pass -----------------------------------------------------------------------------------------
    def _forward(self, x):
        return self(x, training=False) if self._call_has_training_arg else self(x)

    def _fast_forward(self, x, keeps_losses: bool = False):
        """The model's outputs, by its compiled form where there is one.

        keeps_losses: what the call adds with `add_loss` is needed, so a model that does so runs eagerly.
        """
        if self._compiled_forward is None:
            self._compiled_forward = self._compile_forward(x)
        compiled, adds_losses = self._compiled_forward
        if compiled is None or (keeps_losses and adds_losses):
            return self._forward(x)
        if hasattr(self, "_inputs_struct"):
            self._maybe_warn_inputs_struct_mismatch(x)
        return compiled(x)

    def _compile_forward(self, x) -> tuple:
        """(the compiled model or None, whether the call adds losses)."""
        if self.run_eagerly or not self.jit_compile:
            return None, False
        from kgraph.api import compile
        from kgraph.frontend.capture import capture

        try:
            example = None if self.built and not _is_bare(self) else x
            return compile(self, example=example), capture(self, example=example).adds_losses
        except KGraphError as error:
            warnings.warn(f"{self.name} runs eagerly, it could not be compiled: {error}", RuntimeWarning, stacklevel=4)
            return None, False

    # -- steps ----------------------------------------------------------------------------------------------------
    def train_step(self, data):
        raise UnsupportedError(_NO_TRAINING)

    def test_step(self, data):
        x, y, sample_weight = data_adapter_utils.unpack_x_y_sample_weight(data)
        y_pred = self._fast_forward(x, keeps_losses=True)
        loss = self._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=False)
        first = next(leaf for leaf in tree.flatten(x) if leaf is not None)
        self._loss_tracker.update_state(loss, sample_weight=first.shape[0])
        return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def predict_step(self, data):
        x, _, _ = data_adapter_utils.unpack_x_y_sample_weight(data)
        return self._fast_forward(x)

    def make_train_function(self, force=False):
        raise UnsupportedError(_NO_TRAINING)

    def make_test_function(self, force=False):
        if self.test_function is None or force:
            self._compiled_forward = None

            def run(batches):
                for batch in batches:
                    logs = self.test_step(batch)
                return logs

            self.test_function = run
        return self.test_function

    def make_predict_function(self, force=False):
        if self.predict_function is None or force:
            self._compiled_forward = None

            def run(batches):
                outputs = [self.predict_step(batch) for batch in batches]
                return outputs[0] if len(outputs) == 1 else tree.map_structure(lambda *o: np.concatenate(o), *outputs)

            self.predict_function = run
        return self.predict_function

    def _symbolic_build(self, data_batch):
        """Create the variables of model, metrics and loss from the shapes of one batch."""
        metrics_unbuilt = self._compile_metrics is not None and not self._compile_metrics.built
        loss_unbuilt = self._compile_loss is not None and not self._compile_loss.built
        if metrics_unbuilt or loss_unbuilt or not all(layer.built for layer in self._flatten_layers()):
            batch = tree.map_structure(
                lambda v: KerasTensor(v.shape, standardize_dtype(v.dtype)) if is_tensor(v) else v, data_batch
            )
            x, y, sample_weight = data_adapter_utils.unpack_x_y_sample_weight(batch)
            try:
                y_pred = backend.compute_output_spec(self, x)
            except Exception as error:
                raise RuntimeError(
                    "Unable to automatically build the model. Please build it yourself before calling "
                    "fit/evaluate/predict. A model is 'built' when its variables have been created and its "
                    "`self.built` attribute is True. Usually, calling the model on a batch of data is the right way "
                    "to build it."
                ) from error
            if metrics_unbuilt:
                backend.compute_output_spec(self.compute_metrics, x, y, y_pred, sample_weight=sample_weight)
            if loss_unbuilt:
                backend.compute_output_spec(self._compute_loss, x, y, y_pred, sample_weight=sample_weight)
        self._post_build()

    # -- loops ----------------------------------------------------------------------------------------------------
    def fit(self, *args, **kwargs):
        raise UnsupportedError(_NO_TRAINING)

    def train_on_batch(self, *args, **kwargs):
        raise UnsupportedError(_NO_TRAINING)

    def _callbacks(self, callbacks, verbose, steps):
        if isinstance(callbacks, callbacks_module.CallbackList):
            return callbacks
        return callbacks_module.CallbackList(
            callbacks, add_progbar=verbose != 0, verbose=verbose, epochs=1, steps=steps, model=self
        )

    @traceback_utils.filter_traceback
    def evaluate(
        self,
        x=None,
        y=None,
        batch_size=None,
        verbose="auto",
        sample_weight=None,
        steps=None,
        callbacks=None,
        return_dict=False,
        **kwargs,
    ):
        """Loss and metrics over the data, batch by batch."""
        self._assert_compile_called("evaluate")
        cached = kwargs.pop("_use_cached_eval_dataset", False)
        if kwargs:
            raise ValueError(f"Arguments not recognized: {kwargs}")
        if cached:
            batches = self._eval_epoch_iterator
        else:
            batches = EpochIterator(
                x=x,
                y=y,
                sample_weight=sample_weight,
                batch_size=batch_size,
                steps_per_epoch=steps,
                shuffle=False,
                steps_per_execution=self.steps_per_execution,
            )
        if not all(layer.built for layer in self._flatten_layers()):
            for _, _, data in batches:
                self._symbolic_build(data[0])
                break
            batches.reset()
        callbacks = self._callbacks(callbacks, verbose, batches.num_batches)
        run = self.make_test_function()
        self.stop_evaluating = False
        callbacks.on_test_begin()
        logs = {}
        self.reset_metrics()
        for begin_step, end_step, data in batches:
            callbacks.on_test_batch_begin(begin_step)
            logs = run(data)
            callbacks.on_test_batch_end(end_step, logs)
            if self.stop_evaluating:
                break
        logs = pythonify_logs(self._get_metrics_result_or_logs(logs))
        callbacks.on_test_end(logs)
        return logs if return_dict else self._flatten_metrics_in_order(logs)

    @traceback_utils.filter_traceback
    def predict(self, x, batch_size=None, verbose="auto", steps=None, callbacks=None):
        """Outputs for all rows of the data, computed batch by batch."""
        batches = EpochIterator(
            x=x,
            batch_size=batch_size,
            steps_per_epoch=steps,
            shuffle=False,
            steps_per_execution=self.steps_per_execution,
        )
        callbacks = self._callbacks(callbacks, verbose, batches.num_batches)
        run = self.make_predict_function()
        self.stop_predicting = False
        callbacks.on_predict_begin()
        collected = []
        for begin_step, end_step, data in batches:
            callbacks.on_predict_batch_begin(begin_step)
            outputs = run(data)
            collected.append(outputs)
            callbacks.on_predict_batch_end(end_step, {"outputs": outputs})
            if self.stop_predicting:
                break
        callbacks.on_predict_end()
        if not collected:
            raise ValueError("predict got no data")
        return tree.map_structure(lambda *parts: np.concatenate(parts), *collected)

    def test_on_batch(self, x, y=None, sample_weight=None, return_dict=False):
        self._assert_compile_called("test_on_batch")
        data = (x, y, sample_weight)
        self._symbolic_build(data)
        logs = pythonify_logs(self.make_test_function()([data]))
        return logs if return_dict else self._flatten_metrics_in_order(logs)

    def predict_on_batch(self, x):
        return tree.map_structure(backend.convert_to_numpy, self.make_predict_function()([(x,)]))
