"""Writes compiled models to files, and compiles saved graphs again; what only reads files is in `kgraph.runtime`."""
