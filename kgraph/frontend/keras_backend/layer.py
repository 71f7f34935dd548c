"""What Keras' Layer gets from its backend: calls leave their caller's arrays as they are, and take text beside them."""

from __future__ import annotations

import functools

import numpy as np
from keras.src import tree
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask

from kgraph.frontend.eager_array import EagerArray, inside_layer, is_presented


def _as(kind: type, x: np.ndarray) -> np.ndarray:
    """A view of another type, with the mask that Keras keeps for the array."""
    view: np.ndarray = x.view(kind)
    mask = get_keras_mask(x)
    if mask is not None:
        set_keras_mask(view, mask)
    return view


def _guarded(x):
    """An argument with its arrays guarded; a dict stays itself, because Keras' image layers write results into it."""
    if type(x) in (tuple, list):
        return type(x)(_guarded(item) for item in x)
    return _as(EagerArray, x) if type(x) is np.ndarray else x


def _released(x):
    return _as(np.ndarray, x) if type(x) is EagerArray and not is_presented(x) else x


class NumpyLayer:
    """Base of every Keras layer in this process (the name is the one Keras imports)."""

    def __call__(self, *args, **kwargs):
        """The layer's `call`, on arrays that it does not change; Keras' `Layer.__call__` does it between its checks."""
        if hasattr(self, "_functional") or hasattr(self, "_inputs_struct"):
            # Functional and Sequential models only hand the arrays on to their layers.
            return super().__call__(*args, **kwargs)
        kwargs = {name: _guarded(x) for name, x in kwargs.items()}
        outside = inside_layer.set(True)
        try:
            outputs = super().__call__(*_guarded(args), **kwargs)
        finally:
            inside_layer.reset(outside)
        return outputs if type(outputs) is np.ndarray else tree.map_structure(_released, outputs)


class _Whole:
    """An argument of which Keras does not look at the members."""

    def __init__(self, value):
        self.value = value


def _has_text_beside_arrays(x) -> bool:
    if type(x) not in (dict, list, tuple):
        return False
    leaves = tree.flatten(x)
    return any(isinstance(y, (str, bytes)) for y in leaves) and any(isinstance(y, np.ndarray) for y in leaves)


def taking_text(init):
    """`CallSpec.__init__` for arguments such as a dict of images and prompts, which preprocessors are called with.

    Keras refuses tensors in one argument with anything else. On other backends NumPy's arrays are none, here they are.
    """

    @functools.wraps(init)
    def call_spec_init(self, signature, context_names, args, kwargs):
        if not any(map(_has_text_beside_arrays, (*args, *kwargs.values()))):
            init(self, signature, context_names, args, kwargs)
            return
        hide = lambda x: _Whole(x) if _has_text_beside_arrays(x) else x
        show = lambda x: x.value if isinstance(x, _Whole) else x
        hidden = {name: hide(x) for name, x in kwargs.items()}
        init(self, signature, context_names, tuple(map(hide, args)), hidden)
        for name in kwargs.keys() - hidden.keys():
            del kwargs[name]  # those of the context that the layer's call does not take
        for arguments in (self.user_arguments_dict, self.arguments_dict):
            arguments.update({name: show(x) for name, x in arguments.items()})
        self.first_arg = show(self.first_arg)

    return call_spec_init
