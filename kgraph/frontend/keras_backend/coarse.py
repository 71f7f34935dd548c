"""Keeps normalisation and attention whole where Keras composes them above the backend.

Keras has no backend function for layer, RMS and group normalisation, and leaves `dot_product_attention` as soon as a
layer has a dropout rate, even when it does not drop. Taking these apart only to recognise them in the graph again
would cost knowledge, so the finder of `frontend.install` calls `apply` on the modules in `install.COARSE` once they
are loaded, and it replaces the functions in them. To be removed where Keras calls its backend for them.

The same way `Operation.__call__` learns to report unsupported operations to a running capture, arguments of a call may
hold arrays beside text, an `Embedding` of packed weights takes LoRA, for which Keras sets an attribute of the unpacked
tensor, and `Equalization` can be captured, in which sizes depend on values unless the backend's name is "jax".
KerasHub's own: `interpolate` asks for frameworks by name, `align` indexes by a list unless the name is "jax".
"""

from __future__ import annotations

import functools

from keras.src import backend

from kgraph import ops
from kgraph.frontend.keras_backend.core import cast
from kgraph.frontend.keras_backend.core import dense_tensor as convert_to_tensor
from kgraph.frontend.keras_backend.layer import taking_text
from kgraph.frontend.keras_backend.numpy.common import Tensor, filled, reshape_to
from kgraph.frontend.unsupported import collecting


def apply(name: str, module) -> None:
    """Replace the functions of one of the modules of Keras or KerasHub, just loaded."""
    if name == "keras.src.ops.operation":
        module.Operation.__call__ = collecting(module.Operation.__call__)
    elif name == "keras.src.ops.nn":
        module._layer_normalization = _layer_normalization(module._layer_normalization)
        module._rms_normalization = rms_normalization
    elif name == "keras.src.layers.layer":
        module.CallSpec.__init__ = taking_text(module.CallSpec.__init__)
    elif name.endswith("group_normalization"):
        module.GroupNormalization.call = _group_normalization(module.GroupNormalization.call)
    elif name.endswith("core.embedding"):
        module.Embedding.enable_lora = _freezing_the_variable(module.Embedding.enable_lora)
    elif name.endswith("equalization"):
        layer = module.Equalization
        layer._custom_histogram_fixed_width = _histogram(layer._custom_histogram_fixed_width)
        layer._apply_equalization = _of_fixed_sizes(layer._apply_equalization)
    elif name.endswith("depth_anything.interpolate"):
        module.interpolate = interpolate
    elif name.endswith("roformer_v2_attention"):
        module.RoformrPositionalEmbedding.align = align
    elif name.endswith("_attention"):
        layer = getattr(module, "MultiHeadAttention", None) or module.GroupedQueryAttention
        layer._compute_attention = _without_idle_dropout(layer._compute_attention)


def _axes(axis) -> list[int]:
    return sorted(axis) if isinstance(axis, (tuple, list)) else [axis]


def _parameter(value, fill: int, shape: tuple, x: Tensor) -> Tensor:
    """A scale or offset that broadcasts against the trailing axes of x; ones or zeros for None."""
    if value is None:
        return filled(shape, fill, x.dtype.name)
    return reshape_to(convert_to_tensor(value, x.dtype), shape)


def _parameter_shape(x: Tensor, axes: list[int]) -> tuple:
    """From the first normalised axis on, the sizes of the normalised axes and 1 elsewhere."""
    rank = len(x.shape)
    inside = {a % rank for a in axes}
    return tuple(x.shape[a] if a in inside else 1 for a in range(min(inside), rank))


def _layer_normalization(original):
    @functools.wraps(original)
    def layer_normalization(x, gamma=None, beta=None, axis=-1, epsilon=None, rms_scaling=False):
        if rms_scaling or len(x.shape) == 0:
            return original(x, gamma=gamma, beta=beta, axis=axis, epsilon=epsilon, rms_scaling=rms_scaling)
        epsilon = backend.epsilon() if epsilon is None else epsilon
        original_dtype = backend.standardize_dtype(x.dtype)
        x = convert_to_tensor(x, backend.result_type(x.dtype, "float32"))
        axes = _axes(axis)
        shape = _parameter_shape(x, axes)
        scale, offset = _parameter(gamma, 1, shape, x), _parameter(beta, 0, shape, x)
        return cast(ops.layer_norm(x, scale, offset, axes=tuple(axes), epsilon=epsilon), original_dtype)

    return layer_normalization


def rms_normalization(x, scale=None, axis=-1, epsilon=None):
    epsilon = backend.epsilon() if epsilon is None else epsilon
    original_dtype = backend.standardize_dtype(x.dtype)
    x = convert_to_tensor(x, backend.result_type(x.dtype, "float32"))
    x = reshape_to(x, (1,)) if len(x.shape) == 0 else x
    axes = _axes(axis)
    if scale is None:
        scale = filled(_parameter_shape(x, axes), 1, x.dtype.name)
    y = ops.rms_norm(x, convert_to_tensor(scale, x.dtype), axes=tuple(axes), epsilon=epsilon)
    return cast(y, original_dtype)


def _group_normalization(original):
    @functools.wraps(original)
    def group_normalization(self, inputs):
        rank = len(inputs.shape)
        axis = self.axis % rank
        if axis == 0 or rank < 2:
            return original(self, inputs)
        x = convert_to_tensor(inputs)
        x = cast(x, backend.result_type(x.dtype, "float32"))
        order = (*(a for a in range(rank) if a != axis), axis)
        moved = axis != rank - 1
        x = ops.transpose(x, permutation=order) if moved else x
        channels = (x.shape[-1],)
        gamma = _parameter(self.gamma, 1, channels, x)
        beta = _parameter(self.beta, 0, channels, x)
        y = ops.group_norm(x, gamma, beta, groups=self.groups, epsilon=self.epsilon)
        if moved:
            y = ops.transpose(y, permutation=tuple(order.index(a) for a in range(rank)))
        return cast(y, self.compute_dtype)

    return group_normalization


def _without_idle_dropout(original):
    """Attention outside of training has no dropout, whatever rate the layer has."""

    @functools.wraps(original)
    def compute_attention(self, query, key, value, attention_mask=None, training=None, *args, **kwargs):
        rate = "_dropout" if "_dropout" in vars(self) else "dropout"
        idle = not training and getattr(self, rate, 0.0)
        layer = _Seen(self, rate, 0.0) if idle else self
        return original(layer, query, key, value, attention_mask, training, *args, **kwargs)

    return compute_attention


def _histogram(original):
    """How many values lie in each of `nbins` bins around equally spaced centres from one bound to the other: int32."""

    @functools.wraps(original)
    def histogram(self, values, value_range, nbins):
        if self.backend.name != "numpy":  # inside of another framework's data pipeline
            return original(self, values, value_range, nbins)
        low, high = value_range
        values = convert_to_tensor(values, "float32")
        indices = cast((values - low) * (nbins - 1) / (high - low), "int32")
        indices = reshape_to(backend.numpy.clip(indices, 0, nbins - 1), (-1, 1))
        ones = filled((indices.shape[0],), 1, "int32")
        return ops.scatter_nd(filled((nbins,), 0, "int32"), indices, ones, reduction="add")

    return histogram


def _of_fixed_sizes(original):
    """The way that Keras goes for JAX: the first count that is not 0 by argmax rather than by nonzero."""

    @functools.wraps(original)
    def apply_equalization(self, channel, hist):
        if self.backend.name == "numpy":
            self = _Seen(self, "backend", _Seen(self.backend, "name", "jax"))
        return original(self, channel, hist)

    return apply_equalization


def _freezing_the_variable(original):
    """`enable_lora` sets `self.embeddings.trainable`: of the variable, where that is the tensor unpacked from it."""

    @functools.wraps(original)
    def enable_lora(self, *args, **kwargs):
        return original(_Seen(self, "embeddings", self._embeddings) if self.built else self, *args, **kwargs)

    return enable_lora


def interpolate(x, size, data_format=None):
    """4-D images resampled linearly to `size`, (height, width), with the corners' pixels at the corners."""
    axes = (1, 2) if backend.standardize_data_format(data_format) == "channels_last" else (2, 3)
    shape = [dict(zip(axes, size)).get(axis, n) for axis, n in enumerate(x.shape)]
    scale = [(n - 1) / (x.shape[axis] - 1) for axis, n in zip(axes, size)]
    translation = [0.5 - s / 2 for s in scale]
    return backend.image.scale_and_translate(x, shape, scale, translation, axes, "linear", antialias=False)


def align(self, tensor, axes, ndim=None):
    """The tensor with its axes at the places `axes`, in order, of ndim ones; the others have size 1."""
    ndim = ndim or max(axes) + 1
    kept = {axis % ndim for axis in axes}
    return tensor[tuple(slice(None) if axis in kept else None for axis in range(ndim))]


class _Seen:
    """A layer as itself in everything but one attribute, which reads as given."""

    def __init__(self, layer, name: str, value):
        vars(self).update(_layer=layer, **{name: value})

    def __getattr__(self, name):
        return getattr(self._layer, name)

    def __setattr__(self, name, value):
        setattr(self._layer, name, value)
