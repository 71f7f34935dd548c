"""Each layer that Keras' tests check with `run_layer_test` also goes through `kgraph.compile`.

The compiled layer gets the inputs and the state of the eager one, and has to give the same outputs (structure, shapes,
dtypes, values; dense ones where the eager layer gives sparse tensors) and the same state after the call: moving
statistics, seeds.
"""

from __future__ import annotations

import functools
import inspect

import numpy as np

# Relative to the largest magnitude of an output; 16 bits hold 3 or 2 digits, and a float32 result loses some in sums.
TOLERANCES = {"float16": 4e-3, "bfloat16": 3e-2, "float64": 1e-9}
FLOAT32_TOLERANCE = 2e-5
# Where float32 itself is further off, as in a logarithm of what cancels: times the eager result's largest error.
FLOAT32_ERRORS = 4


def install() -> None:
    """Wrap `run_layer_test` of Keras' test case."""
    from keras.src.testing.test_case import TestCase

    original = TestCase.run_layer_test
    signature = inspect.signature(original)

    @functools.wraps(original)
    def run_layer_test(self, *args, **kwargs):
        original(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments
        given.pop("self")
        if not given.get("input_ragged"):
            check(given["layer_cls"], given["init_kwargs"] or {}, given.get("call_kwargs") or {}, *_inputs(given))

    TestCase.run_layer_test = run_layer_test


def _inputs(given: dict) -> tuple:
    """The tensors for a layer's call, as `run_layer_test` makes them from its arguments; () where it makes none."""
    from keras.src import tree
    from keras.src.testing.test_case import create_eager_tensors

    shape, data = given.get("input_shape"), given.get("input_data")
    if data is not None:
        return (data,)
    if shape is None:
        return ()
    dtype = given.get("input_dtype") or tree.map_shape_structure(lambda _: "float32", shape)
    return (create_eager_tensors(shape, dtype, given.get("input_sparse", False), False),)


def check(layer_cls, init_kwargs: dict, call_kwargs: dict, *inputs) -> None:
    """Raise AssertionError where a compiled layer differs from the eager one. inputs: nothing, or the argument."""
    import kgraph
    from kgraph.frontend.keras_backend.trainer import unfit_for_compiling
    from kgraph.frontend.signatures import Arguments

    if not inputs:
        return
    args, kwargs = ((), {**inputs[0], **call_kwargs}) if isinstance(inputs[0], dict) else (inputs, call_kwargs)
    layer = layer_cls(**init_kwargs)
    if unfit_for_compiling(layer):
        return
    if layer._call_has_training_arg:
        kwargs = {"training": False, **kwargs}  # some layers take True for the default
    layer(*args, **kwargs)
    before = [variable.numpy() for variable in layer.variables]
    expected, expected_state = layer(*args, **kwargs), [variable.numpy() for variable in layer.variables]
    for variable, value in zip(layer.variables, before):
        variable.assign(value)
    compiled = kgraph.compile(layer, example=Arguments(*args, **kwargs))
    result = compiled(*args, **kwargs)
    exact = functools.partial(_in_float64, layer_cls, init_kwargs, before, args, kwargs)
    assert_agree(expected, result, f"{layer_cls.__name__}, compiled", exact)
    state = [variable.numpy() for variable in layer.variables]
    names = ", ".join(variable.path for variable in layer.variables)
    assert_agree(expected_state, state, f"{layer_cls.__name__}, variables ({names}) after a compiled call")


def _in_float64(layer_cls, init_kwargs: dict, weights: list, args: tuple, kwargs: dict):
    """What the eager layer gives with 64 bits."""
    from keras.src import tree

    widen = lambda x: x.astype("float64") if getattr(x, "dtype", None) == "float32" else x
    args, kwargs = tree.map_structure(widen, (args, kwargs))
    layer = layer_cls(**{**init_kwargs, "dtype": "float64"})
    layer(*args, **kwargs)
    for variable, value in zip(layer.variables, weights, strict=True):
        variable.assign(value)
    return layer(*args, **kwargs)


def assert_agree(expected, found, what: str, exact=None, spread=None, computed_in=()) -> None:
    """Raise AssertionError where structures, shapes, dtypes or values differ.

    computed_in: names of further dtypes that the outputs are rounded to on the way.
    For float32 results that differ by more than `FLOAT32_TOLERANCE`: exact gives the outputs without rounding, or
    spread gives for each output by how much it changes where what it is computed from is rounded otherwise.
    """
    from keras.src import tree

    tree.assert_same_structure(expected, found)
    for number, (e, f) in enumerate(zip(tree.flatten(expected), tree.flatten(found))):
        if e is None:
            continue
        e, f = np.asarray(e), np.asarray(f)
        assert (e.shape, e.dtype) == (f.shape, f.dtype), f"{what}: {f.dtype}{f.shape}, eager {e.dtype}{e.shape}"
        if e.dtype.kind not in "fcV":
            np.testing.assert_array_equal(f, e, err_msg=what)
            continue
        tolerance = max(TOLERANCES.get(dtype, FLOAT32_TOLERANCE) for dtype in (e.dtype.name, *computed_in))
        e, f = (a.astype("complex128" if a.dtype.kind == "c" else "float64") for a in (e, f))
        scale = max(1.0, float(np.max(np.abs(e), where=np.isfinite(e), initial=0.0)))
        doubtful = tolerance == FLOAT32_TOLERANCE and not np.allclose(f, e, 0, tolerance * scale, True)
        if doubtful and exact is not None:
            e, rounded = np.asarray(tree.flatten(exact())[number]), e
            tolerance = max(tolerance, FLOAT32_ERRORS * float(np.nanmax(np.abs(rounded - e))) / scale)
        elif doubtful and spread is not None:
            tolerance = max(tolerance, FLOAT32_ERRORS * spread()[number] / scale)
        np.testing.assert_allclose(f, e, rtol=0, atol=tolerance * scale, err_msg=what)
