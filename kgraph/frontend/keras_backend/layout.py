"""Changes between Keras' two data formats. kgraph's convolutions and poolings have the channels last."""

from __future__ import annotations

from kgraph import ops
from kgraph.frontend.keras_backend.numpy.common import Tensor


def to_channels_last(x: Tensor, data_format: str) -> Tensor:
    """[N, C, *spatial] -> [N, *spatial, C] where the format is channels_first."""
    if data_format != "channels_first":
        return x
    return ops.transpose(x, permutation=(0, *range(2, len(x.shape)), 1))


def from_channels_last(x: Tensor, data_format: str) -> Tensor:
    """[N, *spatial, C] -> [N, C, *spatial] where the format is channels_first."""
    if data_format != "channels_first":
        return x
    return ops.transpose(x, permutation=(0, len(x.shape) - 1, *range(1, len(x.shape) - 1)))
