"""Writes a compiled model as a C library: no Python, no dependency but libc, libm and pthreads."""

from kgraph.c_export.export import ExportedLibrary, export

__all__ = ["ExportedLibrary", "export"]
