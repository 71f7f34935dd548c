"""What Keras' `model.export` asks of a backend: a SavedModel, which kgraph cannot write."""

from __future__ import annotations

from kgraph.errors import UnsupportedError

_NO_EXPORT = (
    "`export_saved_model` only currently supports the tensorflow, jax and torch backends. A SavedModel needs "
    "TensorFlow, which kgraph does without: save the model with model.save(...) and export it in a process that runs "
    "Keras on one of these."
)


class NumpyExportArchive:
    """Stands where Keras' SavedModel archive is built; every use raises UnsupportedError."""

    def track(self, resource):
        """Raises UnsupportedError."""
        raise UnsupportedError(_NO_EXPORT)

    def add_endpoint(self, name, fn, input_signature=None, **kwargs):
        """Raises UnsupportedError."""
        raise UnsupportedError(_NO_EXPORT)

    def track_and_add_endpoint(self, name, resource, input_signature, **kwargs):
        """Raises UnsupportedError."""
        raise UnsupportedError(_NO_EXPORT)
