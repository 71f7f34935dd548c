"""Keras' `model.export` formats; kgraph's own export is `CompiledModel.export`."""

from __future__ import annotations

from kgraph.errors import UnsupportedError


class NumpyExportArchive:
    """Stands where Keras' SavedModel archive is built; a SavedModel needs TensorFlow."""

    def track(self, resource):
        raise UnsupportedError("model.export to a SavedModel needs TensorFlow; use kgraph.compile(model).export(...)")

    def add_endpoint(self, name, fn, input_signature=None, **kwargs):
        raise UnsupportedError("model.export to a SavedModel needs TensorFlow; use kgraph.compile(model).export(...)")
