"""Blocks of images and back: unfold, fold, depth_to_space, space_to_depth."""

from __future__ import annotations

import numpy as np

from kgraph import ops
from kgraph.frontend.keras_backend.core import dense_tensor as convert_to_tensor
from kgraph.frontend.keras_backend.numpy.common import Tensor, scalar


def _pair(value) -> tuple:
    return (value, value) if isinstance(value, int) else tuple(value)


def unfold(input: Tensor, kernel_size, dilation=1, padding=0, stride=1) -> Tensor:
    """The sliding blocks of [N, C, H, W] as [N, C * kH * kW, number of blocks]."""
    x = convert_to_tensor(input)
    (kh, kw), (dh, dw), (ph, pw), (sh, sw) = map(_pair, (kernel_size, dilation, padding, stride))
    if ph or pw:
        border = (0, 0, ph, pw)
        x = ops.pad(x, scalar(0, x), low=border, high=border, interior=(0, 0, 0, 0))
    n, c, h, w = x.shape
    oh = (h - (kh - 1) * dh - 1) // sh + 1
    ow = (w - (kw - 1) * dw - 1) // sw + 1
    blocks = []
    for i in range(kh):
        for j in range(kw):
            block = ops.slice(
                x,
                start=(0, 0, i * dh, j * dw),
                limit=(n, c, i * dh + (oh - 1) * sh + 1, j * dw + (ow - 1) * sw + 1),
                stride=(1, 1, sh, sw),
            )
            blocks.append(ops.reshape(block, shape=(n, c, 1, oh, ow)))
    return ops.reshape(ops.concatenate(*blocks, axis=2), shape=(n, c * kh * kw, oh * ow))


def fold(x: Tensor, output_size, kernel_size, dilation=1, padding=0, stride=1) -> Tensor:
    """[N, C * kH * kW, blocks] added up into [N, C, H, W], the transpose of `unfold`."""
    x = convert_to_tensor(x)
    (height, width), (kh, kw), (dh, dw) = map(_pair, (output_size, kernel_size, dilation))
    (ph, pw), (sh, sw) = map(_pair, (padding, stride))
    n, channels, _ = x.shape
    c = channels // (kh * kw)
    oh = (height + 2 * ph - dh * (kh - 1) - 1) // sh + 1
    ow = (width + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    x = ops.reshape(x, shape=(n, c, kh * kw, oh, ow))
    total = None
    for i in range(kh):
        for j in range(kw):
            at = i * kw + j
            block = ops.slice(x, start=(0, 0, at, 0, 0), limit=(n, c, at + 1, oh, ow), stride=(1, 1, 1, 1, 1))
            block = ops.reshape(block, shape=(n, c, oh, ow))
            # Spread by the stride and put at the offset of this tap, in the coordinates of the unpadded result.
            low = (i * dh - ph, j * dw - pw)
            high = tuple(
                size - offset - ((count - 1) * step + 1)
                for size, offset, count, step in zip((height, width), low, (oh, ow), (sh, sw))
            )
            block = ops.pad(block, scalar(0, x), low=(0, 0, *low), high=(0, 0, *high), interior=(0, 0, sh - 1, sw - 1))
            total = block if total is None else ops.add(total, block)
    return total


def _interleaved(x: Tensor, split: tuple, permutation: tuple, merged: tuple) -> Tensor:
    return ops.reshape(ops.transpose(ops.reshape(x, shape=split), permutation=permutation), shape=merged)


def depth_to_space(x: Tensor, block_size: int, data_format="channels_last") -> Tensor:
    """Moves groups of block_size^2 channels into blocks of the image."""
    x, b = convert_to_tensor(x), int(block_size)
    if data_format == "channels_last":
        n, h, w, c = x.shape
        c = c // np.square(b).item()
        return _interleaved(x, (n, h, w, b, b, c), (0, 1, 3, 2, 4, 5), (n, h * b, w * b, c))
    n, c, h, w = x.shape
    c = c // np.square(b).item()
    return _interleaved(x, (n, c, b, b, h, w), (0, 1, 4, 2, 5, 3), (n, c, h * b, w * b))


def space_to_depth(x: Tensor, block_size: int, data_format="channels_last") -> Tensor:
    """Moves blocks of the image into channels, the inverse of `depth_to_space`."""
    x, b = convert_to_tensor(x), int(block_size)
    if data_format == "channels_last":
        n, h, w, c = x.shape
        h, w = h // b, w // b
        return _interleaved(x, (n, h, b, w, b, c), (0, 1, 3, 2, 4, 5), (n, h, w, c * b * b))
    n, c, h, w = x.shape
    h, w = h // b, w // b
    return _interleaved(x, (n, c, h, b, w, b), (0, 1, 3, 5, 2, 4), (n, c * b * b, h, w))
