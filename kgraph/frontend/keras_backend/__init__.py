"""kgraph's implementation of Keras' backend interface, under Keras' own module names.

Keras sees these modules as `keras.src.backend.numpy.*` (see `frontend.install`); `interface` stands for the package
itself. Importing any of them from outside first imports Keras, which then imports them in the order it needs.
"""

from kgraph.frontend.install import install

install()

import keras  # noqa: E402, F401
