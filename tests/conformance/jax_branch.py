"""Tests that differentiate with the backend's framework, run by their branch for JAX with kgraph's gradients.

Such a test has a branch per framework: `if backend.backend() == "jax": import jax; jax.grad(...)`. On kgraph it sees
the name "jax", and imports this stand-in, of which `grad` and `jit` are kgraph's. Where Keras skips the test on all
but its own three frameworks, the skip is taken off.
"""

from __future__ import annotations

import sys
import types
from unittest import mock

# (module, function)
TESTS = frozenset(
    {
        ("keras.src.layers.core.dense_test", "test_quantize_float8"),
        ("keras.src.layers.core.einsum_dense_test", "test_quantize_float8"),
        ("keras.src.ops.core_test", "test_custom_gradient"),
        ("keras.src.ops.numpy_test", "test_divide_no_nan_gradients"),
        ("keras.src.quantizers.quantizers_test", "test_fake_quant_with_min_max_vars"),
    }
)


def concerns(item) -> bool:
    """Whether a test is one of `TESTS`; the name of a parameterised one goes on behind the function's."""
    return any(item.module.__name__ == module and item.name.startswith(name) for module, name in TESTS)


def take_off_skips(item) -> None:
    """Let a test run that is marked to be skipped."""
    for node in item.listchain():
        node.own_markers = [mark for mark in node.own_markers if mark.name != "skipif"]


def stand_in() -> mock._patch_dict:
    """A context in which `import jax` gives kgraph's `grad` and `jit`, and of `jax.numpy` what the tests use."""
    import keras

    import kgraph

    jax, numpy = types.ModuleType("jax"), types.ModuleType("jax.numpy")
    vars(numpy).update(array=keras.ops.array, sum=keras.ops.sum)
    vars(jax).update(grad=kgraph.grad, jit=kgraph.jit, numpy=numpy)
    return mock.patch.dict(sys.modules, {"jax": jax, "jax.numpy": numpy})
