"""Tests of kgraph. kgraph is imported here, before any test imports Keras, so that Keras runs on it."""

import kgraph  # noqa: F401
