"""Images as batches with the channels last, [N, H, W, C], and back."""

from __future__ import annotations

from kgraph.frontend.keras_backend.layout import from_channels_last, to_channels_last
from kgraph.frontend.keras_backend.numpy.common import Tensor, drop_axes, insert_axes


def require_image_rank(images: Tensor) -> None:
    """Raises ValueError unless the tensor is one image or a batch of them."""
    if len(images.shape) not in (3, 4):
        raise ValueError(
            "Invalid images rank: expected rank 3 (single image) or rank 4 (batch of images). "
            f"Received input with shape: images.shape={tuple(images.shape)}"
        )


def as_batch(images: Tensor, data_format: str) -> tuple[Tensor, bool]:
    """([N, H, W, C], whether a batch axis was put in)."""
    require_image_rank(images)
    unbatched = len(images.shape) == 3
    x = insert_axes(images, (0,)) if unbatched else images
    return to_channels_last(x, data_format), unbatched


def from_batch(x: Tensor, data_format: str, unbatched: bool) -> Tensor:
    """Undoes `as_batch`."""
    x = from_channels_last(x, data_format)
    return drop_axes(x, (0,)) if unbatched else x
