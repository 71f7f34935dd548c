"""Calls of a model that is a program, or several for different sizes: from nested inputs to nested outputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Number
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kgraph.errors import InputError
from kgraph.structure import Structure
from kgraph.types import TensorType

if TYPE_CHECKING:
    from kgraph.runtime.cuda.device import Device


class Form(Protocol):
    """A model made ready for some or all sizes."""

    inputs: Structure
    outputs: Structure

    def run(self, arrays: list[np.ndarray], out: list | None) -> Sequence[np.ndarray]:
        """The leaves of the outputs; those that `out` gives arrays for are written there."""


class Model:
    """What compiled and loaded models have in common.

    name: for messages. A subclass sets `_inputs`, the structure of the inputs, and `_adapts_rank`: whether a last axis
    of size 1 may be missing or in excess in an input, as in Keras' functional models.
    """

    name: str
    _inputs: Structure
    _adapts_rank: bool
    # What models on a GPU take beside host arrays: arrays there, of any library.
    _device: Device | None = None

    def _form_for(self, arrays: list[np.ndarray]) -> Form:
        """What serves inputs of these shapes."""
        raise NotImplementedError

    def _leaf_value(self, leaf) -> Any:
        """What stands for a leaf of a call's arguments."""
        return leaf

    def __call__(self, *args, out=None, **kwargs):
        """Run the model.

        Args are the model's inputs; NumPy arrays, what `numpy.asarray` takes, or sparse matrices of SciPy.
        `out`: arrays (in the output's structure) to write the results into. `training=False` is accepted, as Keras'
        models take it.
        Raises InputError naming the input that does not fit.
        """
        return self._call(args, kwargs, out)

    def _call(self, args: tuple, kwargs: dict, out):
        form, arrays = self._bind(args, kwargs)
        results = form.run(arrays, None if out is None else form.outputs.flatten(out))
        return form.outputs.pack(results)

    def _bind(self, args: tuple, kwargs: dict) -> tuple[Any, list[np.ndarray]]:
        """Flatten, convert and check the inputs of a call; gives the form that serves them."""
        inputs = self._inputs
        if kwargs.get("training") is not None and inputs.call and "training" not in inputs.template[1]:
            if kwargs["training"]:
                raise InputError(f"{self.name} is compiled for inference; call the Keras model with training=True")
            kwargs = {name: value for name, value in kwargs.items() if name != "training"}
        leaves = map(self._leaf_value, inputs.flatten_call(args, kwargs))
        arrays = [self._as_input(*each) for each in zip(leaves, inputs.names, inputs.types, strict=True)]
        if self._adapts_rank:
            arrays = [_with_rank(array, type_) for array, type_ in zip(arrays, inputs.types)]
        return self._form_for(arrays), arrays

    def _as_input(self, value, name: str, expected: TensorType):
        if self._device is not None and not isinstance(value, np.ndarray):
            from kgraph.runtime.cuda.device_array import from_foreign

            array = from_foreign(value, self._device, f"input {name!r}")
            if array is not None:
                if array.dtype != expected.np_dtype:
                    raise InputError(
                        f"input {name!r}: expected {expected}, got {array.dtype} on the GPU; convert it there"
                    )
                return array
        return as_input(value, name, expected)

    def predict(self, x, batch_size: int | None = None, verbose: int = 0):
        """Outputs for all rows of `x`, computed batch by batch (the last one may be smaller).

        x: arrays in the model's input structure with the same first axis. batch_size: rows of a call, at least 1;
        None means 32.
        verbose: accepted as Keras has it; nothing is printed. Gives arrays in the output structure.
        Raises InputError for inputs that do not fit or have different numbers of rows.
        """
        batch_size = 32 if batch_size is None else batch_size
        if batch_size < 1:
            raise InputError(f"{self.name}: batch_size must be at least 1, got {batch_size}")
        form, arrays = self._bind((x,), {})
        rows = arrays[0].shape[0] if arrays and arrays[0].ndim else 0
        if any(a.ndim == 0 or a.shape[0] != rows for a in arrays):
            shapes = ", ".join(str(a.shape) for a in arrays)
            raise InputError(f"{self.name}: all inputs of predict need the same number of rows, got shapes {shapes}")
        if rows <= batch_size:
            return self(x)
        parts: list[list[np.ndarray]] = []
        for start in range(0, rows, batch_size):
            batch = [a[start : start + batch_size] for a in arrays]
            parts.append(form.outputs.flatten(self(form.inputs.pack(batch))))
        return form.outputs.pack([np.concatenate(p) for p in zip(*parts)])

    @property
    def inputs(self) -> Structure:
        """The structure of the inputs, with the name and type of each; sizes that may vary are symbols, N the batch."""
        return self._inputs


def as_input(value, name: str, expected: TensorType) -> np.ndarray:
    """A leaf of a call as an array of the expected dtype; sparse matrices of SciPy become dense ones.

    Raises InputError for what is no numeric array.
    """
    if value is None:
        raise InputError(f"input {name!r}: expected {expected}, got None")
    if not isinstance(value, np.ndarray) and hasattr(value, "toarray"):
        value = value.toarray()
    try:
        array = np.asarray(value)
        if array.dtype.kind == "O" and array.size and all(isinstance(x, (Number, np.generic)) for x in array.flat):
            array = array.astype(expected.np_dtype)  # columns of several dtypes
    except (TypeError, ValueError) as error:
        raise InputError(f"input {name!r}: expected {expected}, got a {type(value).__name__}: {error}") from error
    if array.dtype == expected.np_dtype:
        return array
    if array.dtype.kind in "OSUMmV" and array.dtype.name not in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        raise InputError(
            f"input {name!r}: expected {expected}, got an array of dtype {array.dtype} and shape {array.shape}"
        )
    if array.dtype.kind == "c" and not expected.dtype.startswith("complex"):
        raise InputError(f"input {name!r}: expected {expected}, got complex numbers of shape {array.shape}")
    return array.astype(expected.np_dtype)


def _with_rank(array: np.ndarray, expected: TensorType) -> np.ndarray:
    """The array with a last axis of size 1 added or removed where that gives the expected rank."""
    if array.ndim == expected.rank + 1 and array.shape[-1] == 1:
        return array.reshape(array.shape[:-1])
    if array.ndim == expected.rank - 1 and isinstance(expected.shape[-1], int) and expected.shape[-1] == 1:
        return array.reshape((*array.shape, 1))
    return array


def sizes_of(shapes: Iterable[tuple], inputs: Structure) -> dict[str, int]:
    """The symbols of the input types, read off concrete shapes. Raises InputError for another rank."""
    sizes: dict[str, int] = {}
    for shape, type_, name in zip(shapes, inputs.types, inputs.names):
        if len(shape) != type_.rank:
            raise InputError(f"{name} has shape {shape}, expected {type_}: the rank differs")
        for size, dim in zip(shape, type_.shape):
            if not isinstance(dim, int):
                (symbol,) = dim.symbols()
                sizes[symbol] = size
    return sizes
