"""Writes captured models as ONNX files. Needs the package `onnx`."""

from kgraph.onnx_export.export import export_onnx

__all__ = ["export_onnx"]
