"""kgraph's implementation of Keras' backend interface, under Keras' own module names.

Keras sees these modules as `keras.src.backend.numpy.*` (see `frontend.install`); `interface` stands for the package
itself. Importing any of them from outside first imports Keras, which then imports them in the order it needs.
"""

from kgraph.frontend.install import foreign_backend, install

if not install():
    raise ImportError(
        f"kgraph's Keras backend cannot be used in this process: Keras already runs on {foreign_backend()!r}. "
        "Import kgraph before keras, or start with KERAS_BACKEND=kgraph."
    )

import keras  # noqa: F401
