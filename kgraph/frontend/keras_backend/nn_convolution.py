"""Convolutions in all of Keras' forms, as one `conv` primitive each."""

from __future__ import annotations

import numpy as np
from keras.src import backend
from keras.src.backend.common.backend_utils import check_conv_input_channels, check_conv_transpose_input_channels

from kgraph import ops
from kgraph.frontend.keras_backend.core import dense_tensor as convert_to_tensor
from kgraph.frontend.keras_backend.layout import from_channels_last, to_channels_last
from kgraph.frontend.keras_backend.numpy.common import Tensor, reshape_to


def _per_axis(value):
    return value if isinstance(value, int) else tuple(int(v) for v in value)


def _operands(inputs: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    kernel = convert_to_tensor(kernel)
    return convert_to_tensor(inputs, dtype=kernel.dtype), kernel


def conv(inputs: Tensor, kernel: Tensor, strides=1, padding="valid", data_format=None, dilation_rate=1) -> Tensor:
    """Convolution of [N, *spatial, C] (or [N, C, *spatial]) with [*window, C / groups, F]."""
    data_format = backend.standardize_data_format(data_format)
    inputs, kernel = _operands(inputs, kernel)
    channels = inputs.shape[-1 if data_format == "channels_last" else 1]
    if channels % kernel.shape[-2] > 0:
        raise ValueError(
            "The number of input channels must be evenly divisible by kernel's in_channels. "
            f"Received input channels {channels} and kernel in_channels {kernel.shape[-2]}. "
        )
    y = ops.conv(
        to_channels_last(inputs, data_format),
        kernel,
        strides=_per_axis(strides),
        padding=padding,
        rhs_dilation=_per_axis(dilation_rate),
        feature_groups=channels // kernel.shape[-2],
    )
    if any(isinstance(n, (int, np.integer)) and n == 0 for n in y.shape[1:]) and 0 not in tuple(inputs.shape):
        raise ValueError(
            "The convolution operation resulted in an empty output. This can happen if the input is too small for the "
            "given kernel size, strides, dilation rate, and padding mode. Please check the input shape and "
            "convolution parameters."
        )
    return from_channels_last(y, data_format)


def depthwise_conv(
    inputs: Tensor, kernel: Tensor, strides=1, padding="valid", data_format=None, dilation_rate=1
) -> Tensor:
    """Each channel convolved with its own M filters, [*window, C, M]; C * M output channels."""
    data_format = backend.standardize_data_format(data_format)
    inputs, kernel = _operands(inputs, kernel)
    check_conv_input_channels(inputs, kernel, data_format)
    channels, multiplier = kernel.shape[-2:]
    y = ops.conv(
        to_channels_last(inputs, data_format),
        reshape_to(kernel, (*kernel.shape[:-2], 1, channels * multiplier)),
        strides=_per_axis(strides),
        padding=padding,
        rhs_dilation=_per_axis(dilation_rate),
        feature_groups=channels,
    )
    return from_channels_last(y, data_format)


def separable_conv(
    inputs: Tensor,
    depthwise_kernel: Tensor,
    pointwise_kernel: Tensor,
    strides=1,
    padding="valid",
    data_format=None,
    dilation_rate=1,
) -> Tensor:
    """A depthwise convolution and a pointwise one after it."""
    y = depthwise_conv(inputs, depthwise_kernel, strides, padding, data_format, dilation_rate)
    return conv(y, pointwise_kernel, strides=1, padding="valid", data_format=data_format)


def conv_transpose(
    inputs: Tensor,
    kernel: Tensor,
    strides=1,
    padding="valid",
    output_padding=None,
    data_format=None,
    dilation_rate=1,
) -> Tensor:
    """The transpose of `conv` as a linear map, with [*window, F, C] filters."""
    data_format = backend.standardize_data_format(data_format)
    inputs, kernel = _operands(inputs, kernel)
    check_conv_transpose_input_channels(inputs, kernel, data_format)
    y = ops.conv_transpose(
        to_channels_last(inputs, data_format),
        kernel,
        strides=_per_axis(strides),
        padding=padding,
        output_padding=None if output_padding is None else _per_axis(output_padding),
        dilation=_per_axis(dilation_rate),
    )
    return from_channels_last(y, data_format)
