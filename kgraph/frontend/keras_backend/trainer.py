"""The part of Keras' Model that trains, evaluates and predicts, each step as one native call."""

from __future__ import annotations

import inspect
import warnings

import numpy as np
from keras.src import backend, tree
from keras.src import callbacks as callbacks_module
from keras.src import optimizers as optimizers_module
from keras.src.backend import config
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask
from keras.src.backend.common.stateless_scope import get_stateless_scope
from keras.src.trainers import trainer as base_trainer
from keras.src.trainers.data_adapters import array_slicing, data_adapter_utils
from keras.src.utils import traceback_utils
from keras.src.utils.python_utils import pythonify_logs

from kgraph.errors import InputError, KGraphError, UnsupportedError
from kgraph.frontend.keras_backend.batches import Batches, batch_of, rows_of, weights_of_classes
from kgraph.frontend.tracer import is_tracing


def _functional(model):
    return getattr(model, "_functional", None) or model


def _declares_inputs(model) -> bool:
    """Whether a model says which sizes of its inputs are free, as Functional and Sequential models do."""
    return getattr(_functional(model), "_inputs_struct", None) is not None


def _has_fixed_batch(model) -> bool:
    """Whether an input of the model is declared for one batch size."""
    declared = tree.flatten(getattr(_functional(model), "_inputs_struct", None))
    return any(x is not None and x.shape and x.shape[0] is not None for x in declared)


# Keras' layers that XLA for TensorFlow lacks something for; here there is nothing that they lack.
_COMPILED_ANYWAY = frozenset("RandomPerspective RandomRotation RandomShear RandomTranslation RandomZoom".split())


def unfit_for_compiling(layer) -> bool:
    """Whether a layer says of itself that it cannot be compiled, and is right."""
    kind = type(layer)
    is_compiled_anyway = kind.__name__ in _COMPILED_ANYWAY and kind.__module__.startswith("keras.src.layers.")
    return not layer.supports_jit and not is_compiled_anyway


def _unfit_layers(model) -> list[str]:
    """The names of a model's layers that cannot be compiled."""
    return [layer.name for layer in model._flatten_layers() if unfit_for_compiling(layer)]


def _takes_one_argument(function) -> bool:
    """Whether a step can be called with the data alone."""
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    return True


def _is_one_batch(x, batch_size: int | None) -> bool:
    """Whether `predict` would take the data as it is in one step: then it needs no iterator, slower than a model."""
    if type(x) is not np.ndarray or not (x.dtype.kind in "iub" or x.dtype == backend.floatx()):
        return False
    return x.ndim > 0 and 0 < len(x) <= (batch_size or 32)


class NumpyTrainer(base_trainer.Trainer):
    """`fit`, `evaluate` and `predict` of Keras models (the name is the one Keras imports).

    `train_step` and `test_step` are traced once per structure of the data (`kgraph.train_step.CompiledStep`), and so
    are overrides of them, of `predict_step`, `compute_loss` and `compute_metrics`, which are written in `keras.ops`;
    the gradient is part of the graph. With `run_eagerly=True` or `jit_compile=False` the same steps run on the
    reference implementations. A test step or a forward pass that cannot be captured runs so too, after a warning that
    says why.
    """

    def __init__(self):
        super().__init__()
        self._jit_compile: bool | None = None
        self.train_function = None
        self.test_function = None
        self.predict_function = None
        self._compiled_train_step = None
        self._compiled_test_step = None
        self._compiled_predict_step = None
        self._compiled_forward: dict = {}

    # -- steps ----------------------------------------------------------------------------------------------------
    def _forward(self, x, training: bool):
        return self(x, training=training) if self._call_has_training_arg else self(x)

    def train_step(self, data):
        """One update of the trainable variables; gives the logs. Works on arrays and under a trace."""
        x, y, sample_weight = data_adapter_utils.unpack_x_y_sample_weight(data)
        if self.optimizer is None:
            raise ValueError("`compile()` was called without an optimizer, which training needs.")
        weights = self.trainable_variables
        if weights:
            loss, y_pred, gradients = self._loss_and_gradients(weights, x, y, sample_weight)
            self.optimizer.apply(gradients, weights)
        else:
            warnings.warn("The model does not have any trainable weights.", stacklevel=2)
            y_pred = self._forward(x, training=True)
            loss = self._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)
        self._loss_tracker.update_state(loss, sample_weight=rows_of(x))
        return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def _loss_and_gradients(self, weights: list, x, y, sample_weight) -> tuple:
        """(loss, predictions, gradients of the loss as the optimizer scales it, None where there is none)."""
        from kgraph.gradients import value_and_grad

        def scaled_loss(values, x, y, sample_weight):
            # A trace always has a scope, and the variables have their values from there.
            with get_stateless_scope().lending(list(zip(weights, values))):
                y_pred = self._forward(x, training=True)
                loss = self._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)
                scaled = self.optimizer.scale_loss(loss)
            return scaled, (loss, y_pred, [get_keras_mask(leaf) for leaf in tree.flatten(y_pred)])

        differentiated = value_and_grad(scaled_loss, has_aux=True, unconnected="none")
        (_, (loss, y_pred, masks)), gradients = differentiated([w.value for w in weights], x, y, sample_weight)
        for leaf, mask in zip(tree.flatten(y_pred), masks):
            if mask is not None:
                set_keras_mask(leaf, mask)
        return loss, y_pred, gradients

    def test_step(self, data):
        """Loss and metrics of one batch; gives the logs. Works on arrays and under a trace."""
        x, y, sample_weight = data_adapter_utils.unpack_x_y_sample_weight(data)
        y_pred = self._forward(x, training=False)
        loss = self._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=False)
        self._loss_tracker.update_state(loss, sample_weight=rows_of(x))
        return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def predict_step(self, data):
        """Outputs for one batch. Works on arrays and under a trace."""
        x, _, _ = data_adapter_utils.unpack_x_y_sample_weight(data)
        return self._forward(x, training=False) if is_tracing() else self._fast_forward(x)

    def _fast_forward(self, x):
        """The model's outputs, by its compiled form where there is one, for the optional inputs that are given."""
        if not _declares_inputs(self):
            return self._forward(x, training=False)
        given = tuple(leaf is not None for leaf in tree.flatten(x))
        if given not in self._compiled_forward:
            self._compiled_forward[given] = self._compile_forward(x)
        compiled = self._compiled_forward[given]
        if compiled is None:
            return self._forward(x, training=False)
        if hasattr(self, "_inputs_struct"):
            self._maybe_warn_inputs_struct_mismatch(x)
        try:
            return compiled(x)
        except InputError:
            if not hasattr(self, "_functional"):
                raise
            # The layers of a Sequential model take what fits them, whatever sizes the model was built with.
            self._compiled_forward[given] = None
            self._compiled_predict_step = self._compiled_step("predict_step")
            return self._run_step("predict_step", (x,))

    def _compile_forward(self, x):
        """The compiled model, or None where it runs eagerly."""
        if self._runs_eagerly():
            return None
        from kgraph.api import compile

        try:
            return compile(self, example=None if all(leaf is not None for leaf in tree.flatten(x)) else x)
        except KGraphError as error:
            self._warn_eager("the forward pass", error)
            return None

    # -- functions of several steps -------------------------------------------------------------------------------
    @property
    def jit_compile(self) -> bool:
        """Whether steps are compiled; by default where no layer is unfit for it."""
        chosen = self._jit_compile
        if chosen is None:
            chosen = self._jit_compile = self._resolve_auto_jit_compile()
        return chosen

    @jit_compile.setter
    def jit_compile(self, value: bool | None) -> None:
        unfit = _unfit_layers(self) if value else []
        if unfit:
            message = f"jit_compile=True has no effect on {self.name}: Keras declares the layers {unfit} unfit for it"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
        self._jit_compile = False if unfit else value

    def _resolve_auto_jit_compile(self) -> bool:
        return not _unfit_layers(self)

    def _runs_eagerly(self) -> bool:
        return self.run_eagerly or not self.jit_compile

    def _warn_eager(self, what: str, error: Exception) -> None:
        message = f"{what} of {self.name} runs eagerly, it could not be compiled: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=4)

    def _compiled_step(self, name: str):
        """A step as one native call; None where it runs eagerly."""
        if self._runs_eagerly():
            unfit = _unfit_layers(self)
            if unfit and not self.run_eagerly:
                warnings.warn(
                    f"{name} of {self.name} runs eagerly and slowly: Keras declares the layers {unfit} unfit for "
                    "compiling. Apply them to the data ahead of the model.",
                    RuntimeWarning,
                    stacklevel=4,
                )
            return None
        from kgraph.train_step import CompiledStep

        function, symbolic = getattr(self, name), not _has_fixed_batch(self)
        return CompiledStep(function, f"{self.name}_{name}", training=name == "train_step", symbolic_batch=symbolic)

    def make_train_function(self, force=False):
        if self.train_function is not None and not force:
            return self.train_function
        if not _takes_one_argument(self.train_step):
            raise UnsupportedError(
                f"{type(self).__name__}.train_step takes {inspect.signature(self.train_step)}; on kgraph it takes "
                "`data` and gives the logs. A step that is written for the state of JAX cannot run; override "
                "`compute_loss`, or call `super().train_step(data)`."
            )
        self._compiled_train_step = self._compiled_step("train_step")

        def train_function(batches):
            step = self._compiled_train_step or self.train_step
            for batch in batches:
                logs = step(batch)
            return logs

        self.train_function = train_function
        return train_function

    def _run_step(self, name: str, batch):
        """A step on one batch: compiled, or eagerly from the first batch on that shows that it cannot be."""
        compiled = getattr(self, f"_compiled_{name}")
        if compiled is None:
            return getattr(self, name)(batch)
        try:
            return compiled(batch)
        except KGraphError as error:
            results = getattr(self, name)(batch)  # raises if it is the batch that is wrong
            self._warn_eager(f"the {name.replace('_', ' ')}", error)
            setattr(self, f"_compiled_{name}", None)
            return results

    def make_test_function(self, force=False):
        if self.test_function is not None and not force:
            return self.test_function
        self._compiled_test_step = self._compiled_step("test_step")

        def test_function(batches):
            for batch in batches:
                logs = self._run_step("test_step", batch)
            return logs

        self.test_function = test_function
        return test_function

    def make_predict_function(self, force=False):
        if self.predict_function is not None and not force:
            return self.predict_function
        self._compiled_forward = {}
        self._compiled_predict_step = None
        prepared = False

        def predict_function(batches):
            nonlocal prepared
            if not prepared:
                self._prepare_predict_step(batches[0])
                prepared = True
            outputs = [self._run_step("predict_step", batch) for batch in batches]
            return outputs[0] if len(outputs) == 1 else tree.map_structure(lambda *o: np.concatenate(o), *outputs)

        self.predict_function = predict_function
        return predict_function

    def _prepare_predict_step(self, batch) -> None:
        """Build the model by a batch if it is not, and decide how it predicts.

        An override of the step is traced as the other steps are, and so is a model that does not say which sizes of
        its inputs are free, or that is declared for one batch size (Keras runs it with others too). Keras' own step on
        any other model is the model and nothing else, compiled as such.
        """
        if not all(layer.built for layer in self._flatten_layers()):
            x, _, _ = data_adapter_utils.unpack_x_y_sample_weight(batch)
            as_symbol = lambda leaf: backend.KerasTensor(leaf.shape, backend.standardize_dtype(leaf.dtype))
            x = tree.map_structure(lambda leaf: None if leaf is None else as_symbol(leaf), x)
            backend.compute_output_spec(self._forward, x, training=False)
        overridden = getattr(self.predict_step, "__func__", None) is not NumpyTrainer.predict_step
        if overridden or not _declares_inputs(self) or _has_fixed_batch(self):
            self._compiled_predict_step = self._compiled_step("predict_step")

    # -- loops ----------------------------------------------------------------------------------------------------
    def _batches(self, x, y=None, sample_weight=None, **options) -> Batches:
        return Batches(x=x, y=y, sample_weight=sample_weight, steps_per_execution=self.steps_per_execution, **options)

    def _callbacks(self, callbacks, verbose, steps, epochs: int = 1, history: bool = False):
        if isinstance(callbacks, callbacks_module.CallbackList):
            return callbacks
        return callbacks_module.CallbackList(
            callbacks,
            add_history=history,
            add_progbar=verbose != 0,
            verbose=verbose,
            epochs=epochs,
            steps=steps,
            model=self,
        )

    @traceback_utils.filter_traceback
    def fit(
        self,
        x=None,
        y=None,
        batch_size=None,
        epochs=1,
        verbose="auto",
        callbacks=None,
        validation_split=0.0,
        validation_data=None,
        shuffle=True,
        class_weight=None,
        sample_weight=None,
        initial_epoch=0,
        steps_per_epoch=None,
        validation_steps=None,
        validation_batch_size=None,
        validation_freq=1,
    ):
        """Train for a number of epochs; gives the `History`. See `keras.Model.fit`."""
        self._assert_compile_called("fit")
        limit = config.max_epochs()
        if limit and limit < epochs:
            warnings.warn(f"Limiting epochs to {limit}", stacklevel=2)
            epochs = limit
        self._eval_epoch_iterator = None
        if validation_split and validation_data is None:
            (x, y, sample_weight), validation_data = array_slicing.train_validation_split(
                (x, y, sample_weight), validation_split=validation_split
            )
        batches = self._batches(
            x,
            y,
            sample_weight,
            batch_size=batch_size,
            steps_per_epoch=steps_per_epoch,
            shuffle=shuffle,
            class_weight=class_weight,
        )
        self._symbolic_build(iterator=batches)
        batches.reset()
        callbacks = self._callbacks(callbacks, verbose, batches.num_batches, epochs, history=True)

        def validate() -> dict:
            val_x, val_y, val_weight = data_adapter_utils.unpack_x_y_sample_weight(validation_data)
            size = validation_batch_size or batch_size
            if self._eval_epoch_iterator is None:
                self._eval_epoch_iterator = self._batches(
                    val_x, val_y, val_weight, batch_size=size, steps_per_epoch=validation_steps, shuffle=False
                )
            logs = self.evaluate(
                x=val_x,
                y=val_y,
                sample_weight=val_weight,
                batch_size=size,
                steps=validation_steps,
                callbacks=callbacks,
                return_dict=True,
                _use_cached_eval_dataset=True,
            )
            return {f"val_{name}": value for name, value in logs.items()}

        self.make_train_function()
        self.stop_training = False
        training_logs: dict = {}
        callbacks.on_train_begin()
        # A callback that resumes an interrupted training has set the epoch to go on with.
        first_epoch = self._initial_epoch or initial_epoch
        try:
            for epoch in range(first_epoch, epochs):
                self.reset_metrics()
                callbacks.on_epoch_begin(epoch)
                logs = self._train_epoch(batches, callbacks)
                epoch_logs = dict(self._get_metrics_result_or_logs(logs))
                if validation_data is not None and self._should_eval(epoch, validation_freq):
                    epoch_logs.update(validate())
                callbacks.on_epoch_end(epoch, epoch_logs)
                training_logs = epoch_logs
                if self.stop_training:
                    break
        finally:
            if isinstance(self.optimizer, optimizers_module.Optimizer) and epochs > 0 and self.optimizer.built:
                self.optimizer.finalize_variable_values(self.trainable_weights)
            self._eval_epoch_iterator = None
        callbacks.on_train_end(logs=training_logs)
        return self.history

    def _train_epoch(self, batches: Batches, callbacks) -> dict:
        """All batches of an epoch; gives the logs of the last one."""
        logs: dict = {}
        for begin_step, end_step, data in batches:
            callbacks.on_train_batch_begin(begin_step)
            logs = self.train_function(data)
            callbacks.on_train_batch_end(end_step, logs)
            if self.stop_training:
                break
        return logs

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
            batches = self._batches(x, y, sample_weight, batch_size=batch_size, steps_per_epoch=steps, shuffle=False)
        self._symbolic_build(iterator=batches)
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
        if verbose == 0 and not callbacks and steps is None and _is_one_batch(x, batch_size):
            return self.predict_on_batch(x)
        batches = self._batches(x, batch_size=batch_size, steps_per_epoch=steps, shuffle=False)
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

    # -- single batches -------------------------------------------------------------------------------------------
    @traceback_utils.filter_traceback
    def train_on_batch(self, x, y=None, sample_weight=None, class_weight=None, return_dict=False):
        """One update on one batch; gives loss and metrics of it."""
        self._assert_compile_called("train_on_batch")
        data = batch_of(x, y, weights_of_classes(y, sample_weight, class_weight))
        self._symbolic_build(data_batch=data)
        run = self.make_train_function()
        self.reset_metrics()
        logs = pythonify_logs(run([data]))
        return logs if return_dict else self._flatten_metrics_in_order(logs)

    @traceback_utils.filter_traceback
    def test_on_batch(self, x, y=None, sample_weight=None, return_dict=False):
        """Loss and metrics of one batch."""
        self._assert_compile_called("test_on_batch")
        data = batch_of(x, y, sample_weight)
        self._symbolic_build(data_batch=data)
        run = self.make_test_function()
        self.reset_metrics()
        logs = pythonify_logs(run([data]))
        return logs if return_dict else self._flatten_metrics_in_order(logs)

    def predict_on_batch(self, x):
        """Outputs for one batch."""
        return tree.map_structure(backend.convert_to_numpy, self.make_predict_function()([batch_of(x)]))
