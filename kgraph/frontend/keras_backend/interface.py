"""The names that Keras expects of a backend package; served to it as `keras.src.backend.numpy`."""

import types

from keras.src.backend.common.name_scope import name_scope

from kgraph.frontend.keras_backend import core, image, linalg, math, nn, numpy, random
from kgraph.frontend.keras_backend.core import (
    IS_THREAD_SAFE,
    SUPPORTS_COMPLEX_DTYPES,
    SUPPORTS_RAGGED_TENSORS,
    SUPPORTS_SPARSE_TENSORS,
    Variable,
    cast,
    compute_output_spec,
    cond,
    convert_to_numpy,
    convert_to_tensor,
    device_scope,
    is_tensor,
    random_seed_dtype,
    shape,
    standardize_shape,
    vectorized_map,
)
from kgraph.frontend.keras_backend.rnn import bidirectional_gru, bidirectional_lstm, cudnn_ok, gru, lstm, rnn

# `keras.src.backend` star-imports this module after its own `standardize_shape`, so ours, which turns symbolic sizes
# into None, takes its place in Keras.
__all__ = [
    "IS_THREAD_SAFE",
    "SUPPORTS_COMPLEX_DTYPES",
    "SUPPORTS_RAGGED_TENSORS",
    "SUPPORTS_SPARSE_TENSORS",
    "Variable",
    "bidirectional_gru",
    "bidirectional_lstm",
    "cast",
    "compute_output_spec",
    "cond",
    "convert_to_numpy",
    "convert_to_tensor",
    "core",
    "cudnn_ok",
    "device_scope",
    "gru",
    "image",
    "is_tensor",
    "linalg",
    "lstm",
    "math",
    "name_scope",
    "nn",
    "numpy",
    "random",
    "random_seed_dtype",
    "rnn",
    "shape",
    "standardize_shape",
    "vectorized_map",
]


# Keras' operations are not annotated, and it takes their signatures and its backend's for equal. The annotations in the
# sources are for type checkers alone.
for _module in (core, image, linalg, math, nn, numpy, random):
    for _function in vars(_module).values():
        # A decorated function is asked for the signature of what it wraps.
        while isinstance(_function, types.FunctionType) and _function.__module__.startswith("kgraph."):
            _function.__annotations__ = {}
            _function = getattr(_function, "__wrapped__", None)
