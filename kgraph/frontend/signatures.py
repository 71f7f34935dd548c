"""The structure, names and symbolic sizes of a model's inputs, known before it is traced."""

from __future__ import annotations

import inspect
from typing import Any

import keras
import numpy as np

from kgraph.errors import CaptureError, UnsupportedError
from kgraph.frontend.keras_backend import core
from kgraph.frontend.traced_array import TracedArray
from kgraph.ir import Dim, TensorType, dtype_name, type_of
from kgraph.structure import Structure


class Arguments:
    """Example arguments of a call with several of them: `example=Arguments(x, y, mask=m)`."""

    def __init__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs


def signature(model, example: Any = None) -> tuple[Structure, dict[str, str]]:
    """The structure of a model's inputs, with symbolic sizes, and where each symbol comes from. Builds the model.

    Raises CaptureError where the shapes are not known.
    """
    if isinstance(model, keras.Sequential) and not model.built and example is None:
        raise CaptureError(
            f"model {model.name!r} is not built: add keras.Input(shape) as its first layer, or give `example`"
        )
    functional = getattr(model, "_functional", None) or model
    declared = getattr(functional, "_inputs_struct", None)
    if declared is not None and example is None:
        return _declared_signature(declared)
    if example is not None:
        return _example_signature(model, example)
    shapes = getattr(model, "_build_shapes_dict", None)
    if not model.built or not shapes:
        raise CaptureError(
            f"the shapes of the inputs of {model.name!r} are not known: call it once or give `example=` (inputs of one "
            "call, whose first axis is the batch)"
        )
    return _built_signature(model, shapes)


# -- kinds of models ---------------------------------------------------------------------------------------------------
class _Symbols:
    """Names for the unknown sizes of inputs: N for the batch, L<axis> (then L<axis>_2 ...) for other axes."""

    def __init__(self):
        self.origins: dict[str, str] = {}

    def shape(self, sizes, input_name: str) -> tuple:
        return tuple(self._size(s, axis, input_name) for axis, s in enumerate(sizes))

    def _size(self, size, axis: int, input_name: str):
        if size is not None:
            return size
        if axis == 0:
            self.origins["N"] = "batch"
            return Dim.symbol("N")
        name, count = f"L{axis}", 1
        while name in self.origins:
            count += 1
            name = f"L{axis}_{count}"
        self.origins[name] = f"axis {axis} of input {input_name!r}"
        return Dim.symbol(name)


def path_name(path: tuple, default: str) -> str:
    """A leaf's name from its keys and positions."""
    return "_".join(str(p) for p in path) if path else default


def _input_name(tensor) -> str:
    """The name that the user gave an input, or else that of its layer."""
    history = getattr(tensor, "_keras_history", None)
    if tensor.name.startswith("keras_tensor") and history is not None:
        return history.operation.name
    return tensor.name


def _argument_name(parameters: list[str], path: tuple, count: int) -> str:
    """A name for the leaf at a path `(0, position, ...)` or `(1, keyword, ...)` of a call's arguments."""
    kind, place, *rest = path
    if kind == 0:
        place = parameters[place] if place < len(parameters) else place
    return path_name(tuple(rest), str(place)) if count == 1 else path_name((place, *rest), "x")


def _declared_signature(declared) -> tuple[Structure, dict]:
    """Of a Functional model, from its KerasTensors."""
    symbols = _Symbols()

    def describe(leaf, path):
        if leaf.ragged:
            raise UnsupportedError(f"input {leaf.name!r} is ragged; kgraph takes dense and sparse ones")
        name = _input_name(leaf)
        return name, TensorType(symbols.shape(leaf.shape, name), leaf.dtype)

    is_leaf = lambda x: isinstance(x, keras.KerasTensor)
    structure, leaves = Structure.of(((declared,), {}), is_leaf, describe, call=True)
    # A model of one input that is declared as a list of one is called with the tensor itself.
    if len(leaves) == 1 and isinstance(declared, (list, tuple)) and len(declared) == 1:
        (args, _) = structure.template
        structure = Structure(((args[0][0],), {}), structure.names, structure.types, call=True)
    return structure, symbols.origins


def _example_signature(model, example) -> tuple[Structure, dict]:
    arguments = example if isinstance(example, Arguments) else Arguments(example)
    parameters = list(inspect.signature(getattr(model, "call", model)).parameters)
    symbols = _Symbols()

    def describe(leaf, path):
        if not isinstance(leaf, keras.KerasTensor):
            leaf = core.convert_to_tensor(leaf)
        name = _argument_name(parameters, path, len(arguments.args) + len(arguments.kwargs))
        shape = tuple(leaf.shape)
        if shape and shape[0] is not None:
            shape = (None, *shape[1:])
        return name, TensorType(symbols.shape(shape, name), keras.backend.standardize_dtype(leaf.dtype))

    is_leaf = lambda x: is_array(x) or isinstance(x, keras.KerasTensor)
    structure, leaves = Structure.of((arguments.args, arguments.kwargs), is_leaf, describe, call=True)
    if not all(layer.built for layer in _layers(model)):
        # Built symbolically: no values are computed.
        tensors = [
            leaf
            if isinstance(leaf, keras.KerasTensor)
            else keras.KerasTensor((None, *t.shape[1:]) if t.shape else (), t.dtype)
            for leaf, t in zip(leaves, structure.types)
        ]
        args, kwargs = structure.pack_call(tensors)
        core.compute_output_spec(model, *args, **kwargs)
    return structure, symbols.origins


class _Shape:
    """A shape as the leaf of a structure; the batch that a model was built with stands for any."""

    def __init__(self, sizes):
        self.sizes = (None, *sizes[1:])


def _with_shapes_as_leaves(x):
    if isinstance(x, dict):
        return {key: _with_shapes_as_leaves(value) for key, value in x.items()}
    if all(size is None or isinstance(size, int) for size in x):
        return _Shape(x)
    return [_with_shapes_as_leaves(value) for value in x]


def _built_signature(model, shapes: dict) -> tuple[Structure, dict]:
    """Of a subclassed model or a layer, from the shapes that it was built with, by argument name."""
    symbols = _Symbols()
    arguments = {key.removesuffix("_shape"): _with_shapes_as_leaves(value) for key, value in shapes.items()}
    single = len(arguments) == 1

    def describe(leaf, path):
        name = path_name(path[2:] if single else path[1:], "x")
        return name, TensorType(symbols.shape(leaf.sizes, name), model.input_dtype)

    call = ((next(iter(arguments.values())),), {}) if single else ((), arguments)
    structure, _ = Structure.of(call, lambda x: isinstance(x, _Shape), describe, call=True)
    return structure, symbols.origins


def _layers(model) -> list:
    return model._flatten_layers() if hasattr(model, "_flatten_layers") else [model]


def is_array(x) -> bool:
    """Whether a leaf of a call's arguments is a tensor, rather than a fixed value."""
    return isinstance(x, (np.ndarray, np.generic, TracedArray, core.Variable)) or core.is_sparse(x)


def type_of_leaf(x) -> TensorType:
    """The type of what `is_array` takes for a tensor: of a sparse one, that of its dense form."""
    if isinstance(x, core.Variable):
        x = x.value
    return TensorType(tuple(x.shape), dtype_name(x.dtype)) if core.is_sparse(x) else type_of(x)
