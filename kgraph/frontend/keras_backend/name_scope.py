"""Name scopes give variables and layers their paths; Keras' own implementation serves."""

from keras.src.backend.common.name_scope import name_scope

__all__ = ["name_scope"]
