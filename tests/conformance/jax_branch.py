"""Tests with a branch per framework, run by their branch for JAX on kgraph's gradients and sparse tensors.

Such a test reads `if backend.backend() == "jax": import jax; ...`, to differentiate with the backend's framework or to
make a sparse tensor of the backend's. On kgraph the places below see the name "jax", and what they import as `jax` is a
stand-in with kgraph's `grad`, `jit` and `SparseTensor`. Where Keras skips a test of gradients on all but its own three
frameworks, the skip is taken off.
"""

from __future__ import annotations

import builtins
import functools
import sys
import types

import numpy as np

# (module, function): tests of gradients.
TESTS = frozenset(
    {
        ("keras.src.layers.core.dense_test", "test_quantize_float8"),
        ("keras.src.layers.core.einsum_dense_test", "test_quantize_float8"),
        ("keras.src.ops.core_test", "test_custom_gradient"),
        ("keras.src.ops.numpy_test", "test_divide_no_nan_gradients"),
        ("keras.src.quantizers.quantizers_test", "test_fake_quant_with_min_max_vars"),
    }
)
# Functions that make sparse tensors or ask for them.
SPARSE = frozenset(
    {
        ("keras.src.testing.test_case", "assertSparse"),
        ("keras.src.testing.test_case", "create_eager_tensors"),
        ("keras.src.layers.core.dense_test", "test_dense_sparse"),
        ("keras.src.layers.core.embedding_test", "test_correctness_sparse"),
        ("keras.src.layers.merging.merging_test", "test_sparse"),
        ("keras.src.layers.reshaping.flatten_test", "test_flatten"),
        ("keras.src.layers.reshaping.permute_test", "test_permute"),
        ("keras.src.ops.core_test", "test_convert_to_tensor_sparse"),
        ("keras.src.ops.core_test", "test_shape_sparse"),
        ("keras.src.ops.numpy_test", "create_indexed_slices"),
        ("keras.src.ops.numpy_test", "create_sparse_tensor"),
        ("keras.src.ops.numpy_test", "test_bincount"),
        ("keras.src.ops.numpy_test", "test_concatenate_sparse"),
        ("keras.src.ops.numpy_test", "test_matmul_sparse"),
        ("keras.src.ops.numpy_test", "test_take_sparse"),
        ("keras.src.optimizers.optimizer_sparse_test", "test_sparse_correctness"),
        ("keras.src.optimizers.optimizer_sparse_test", "test_sparse_gradients"),
        ("keras.src.trainers.trainer_test", "sparse_generator"),
        ("keras.src.trainers.trainer_test", "test_fit_sparse"),
    }
)
PLACES = TESTS | SPARSE


def take_off_skips(item) -> None:
    """Let a test run that is one of `TESTS` and marked to be skipped; the names of parameterised ones go on behind."""
    if any(item.module.__name__ == module and item.name.startswith(name) for module, name in TESTS):
        for node in item.listchain():
            node.own_markers = [mark for mark in node.own_markers if mark.name != "skipif"]


def install() -> None:
    """Let `PLACES` import the stand-in as `jax`; everything else imports what there is."""
    inner = builtins.__import__

    def import_module(name, globals=None, locals=None, fromlist=(), level=0):
        if level == 0 and name.partition(".")[0] == "jax":
            frame = sys._getframe(1)
            if (frame.f_globals.get("__name__"), frame.f_code.co_name) in PLACES:
                return stand_in(name if fromlist else "jax")
        return inner(name, globals, locals, fromlist, level)

    builtins.__import__ = import_module


def stand_in(name: str) -> types.ModuleType:
    """The module that stands for JAX' module of that name."""
    return _modules()[name]


@functools.cache
def _modules() -> dict[str, types.ModuleType]:
    import keras

    import kgraph

    names = ("jax", "jax.numpy", "jax.random", "jax.experimental", "jax.experimental.sparse")
    modules = {name: types.ModuleType(name) for name in names}
    for name, module in modules.items():
        package, _, last = name.rpartition(".")
        if package:
            setattr(modules[package], last, module)
    vars(modules["jax"]).update(grad=kgraph.grad, jit=kgraph.jit)
    vars(modules["jax.numpy"]).update({name: f for name, f in vars(keras.ops).items() if not name.startswith("_")})
    vars(modules["jax.random"]).update(
        PRNGKey=int, uniform=lambda seed, shape, dtype: keras.random.uniform(shape, dtype=dtype, seed=seed)
    )
    vars(modules["jax.experimental.sparse"]).update(JAXSparse=kgraph.SparseTensor, BCOO=BCOO, random_bcoo=random_bcoo)
    return modules


class BCOO:
    """Makes kgraph's sparse tensors from the arguments of JAX' class of that name."""

    def __new__(cls, args, shape):
        import kgraph

        data, indices = (np.asarray(x) for x in args)
        data = data.astype("float32") if data.dtype == np.float64 else data  # JAX' default width
        batch = shape[: indices.ndim - 2]
        if batch:
            # Each place of the first axes has entries of its own, or all have the same.
            entries = indices.shape[-2]
            indices = np.broadcast_to(indices, (*batch, *indices.shape[-2:]))
            first = np.moveaxis(np.indices((*batch, entries))[: len(batch)], 0, -1)
            indices = np.concatenate([first, indices], axis=-1).reshape(-1, len(batch) + indices.shape[-1])
            block = data.shape[len(batch) + 1 :]
            data = np.broadcast_to(data, (*batch, entries, *block)).reshape(-1, *block)
        return kgraph.SparseTensor(indices, data, shape)

    @staticmethod
    def fromdense(x, n_batch: int = 0):
        """The sparse tensor of a dense one; the layout that JAX would have is not kept."""
        import kgraph

        return kgraph.SparseTensor.from_dense(x)


def random_bcoo(seed, shape, dtype, nse: float):
    """A sparse tensor in which about a part `nse` of the elements are drawn, the others zero."""
    rng = np.random.default_rng(seed)
    return BCOO.fromdense((rng.standard_normal(shape) * (rng.random(shape) < nse)).astype(dtype))
