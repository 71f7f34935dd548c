"""Batches on their way to a step: the data iterator of an epoch, and arguments of the `_on_batch` methods."""

from __future__ import annotations

import itertools
import numbers

import numpy as np
from keras.src import backend, tree
from keras.src.trainers.data_adapters import data_adapter_utils
from keras.src.trainers.epoch_iterator import EpochIterator

from kgraph.errors import InputError
from kgraph.frontend.keras_backend.core import dense_tensor, is_sparse
from kgraph.frontend.keras_backend.sparse import SparseTensor


class Batches(EpochIterator):
    """Lists of up to `steps_per_execution` batches; the last one may be shorter without a warning.

    Batches of sparse data are dense: steps are compiled for dense inputs.
    Raises InputError for data of a known length of 0, or for none at all.
    """

    def __init__(self, x=None, *args, **options):
        if x is None:
            raise InputError("There is no data: give `x` (arrays, a PyDataset, a DataLoader, a generator).")
        x, *args = tree.map_structure(_sliceable, [x, *args])
        super().__init__(x, *args, **options)
        if self.data_adapter.num_batches == 0:
            raise InputError(f"The data is empty: {type(x).__name__} `x` has no rows.")

    def _get_iterator(self):
        for batch in super()._get_iterator():
            plain = type(batch) is tuple and all(type(x) is np.ndarray for x in batch)
            yield batch if plain else tree.map_structure(_dense, batch, none_is_leaf=False)

    def __next__(self):
        begin_step, end_step, iterator = next(self._epoch_iterator)
        batches = list(itertools.islice(iterator, self.steps_per_execution))
        if batches:
            return begin_step, end_step, batches
        with self.catch_stop_iteration():
            raise StopIteration
        raise StopIteration


def _sliceable(x):
    """A sparse matrix as SciPy's, of which Keras takes rows without making all of it dense."""
    if type(x) is not SparseTensor or x.ndim != 2:
        return x
    from scipy import sparse

    x = x.spelled_out()
    return sparse.coo_matrix((x.values, tuple(x.indices.T)), shape=x.shape).tocsr()


def _dense(x):
    """A leaf of a batch, dense where it is a sparse tensor of kgraph's, SciPy's or another framework's."""
    if isinstance(x, np.ndarray):
        return x.view(np.ndarray) if isinstance(x, np.matrix) else x  # what Keras makes of SciPy's: `*` is matmul there
    if data_adapter_utils.is_tensorflow_sparse(x):
        x = SparseTensor(np.asarray(x.indices), np.asarray(x.values), x.shape)
    elif data_adapter_utils.is_jax_sparse(x):
        return np.asarray(x.todense())
    return dense_tensor(x) if is_sparse(x) else x


def rows_of(x):
    """The batch size: of the first input there is."""
    return next(leaf for leaf in tree.flatten(x) if leaf is not None).shape[0]


def batch_of(*parts) -> tuple:
    """Arguments of the `_on_batch` methods as a batch of `fit`: arrays, and nothing for what is missing at the end.

    Numbers nested in lists become arrays too, and floats have Keras' float type.
    """

    def array(x):
        if x is None:
            return None
        x = dense_tensor(x)
        return x.astype(backend.floatx()) if x.dtype == np.float64 else x

    def convert(part):
        if isinstance(part, (list, tuple)) and all(isinstance(leaf, numbers.Number) for leaf in tree.flatten(part)):
            return array(part)
        return tree.map_structure(array, part)

    given = max((i for i, part in enumerate(parts) if part is not None), default=0) + 1
    return tuple(convert(part) for part in parts[:given])


def weights_of_classes(y, sample_weight, class_weight: dict | None):
    """The sample weights of a batch. Raises ValueError where both kinds of weights are given."""
    if class_weight is None:
        return sample_weight
    if sample_weight is not None:
        raise ValueError(
            "Arguments `sample_weight` and `class_weight` cannot be specified at the same time. "
            f"Received: sample_weight={sample_weight}, class_weight={class_weight}"
        )
    return data_adapter_utils.class_weight_to_sample_weights(y, class_weight)


__all__ = ["Batches", "batch_of", "rows_of", "weights_of_classes"]
