"""Symbolic sizes under the IR's name; `kgraph.dims`, which the runtime shares, defines them."""

from kgraph.dims import Dim, ceil_div, evaluate, is_static, product, substitute, symbols

__all__ = ["Dim", "ceil_div", "evaluate", "is_static", "product", "substitute", "symbols"]
