"""The mixin that Keras' Layer inherits from its backend; kgraph needs nothing in it."""


class NumpyLayer:
    """Base of every Keras layer in this process (the name is the one Keras imports)."""
