"""Scaled dot-product attention."""

from __future__ import annotations

import math

from keras.src import backend

from kgraph import ops
from kgraph.errors import UnsupportedError
from kgraph.frontend.keras_backend.core import cast
from kgraph.frontend.keras_backend.core import dense_tensor as convert_to_tensor
from kgraph.frontend.keras_backend.numpy.common import Tensor, insert_axes, to_bool
from kgraph.frontend.tracer import TracedArray


def _with_heads(t: Tensor, heads: int) -> Tensor:
    """A mask or bias of lower rank as one that broadcasts to [B, N, T, S]: [T, S], [B, T, S] or [N | B, S] forms."""
    while len(t.shape) < 4:
        per_head = len(t.shape) == 3 and t.shape[1] == heads
        t = insert_axes(t, (2,)) if per_head else insert_axes(t, (1 if len(t.shape) > 2 else 0,))
    return t


def dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias=None,
    mask=None,
    scale=None,
    is_causal: bool = False,
    flash_attention=None,
    attn_logits_soft_cap=None,
) -> Tensor:
    """softmax(query key^T scale + bias, where mask) value for [B, T, N, H] queries and [B, S, K, H] keys.

    `flash_attention` is taken as a hint: compiled code never holds the score matrix, whatever it says.
    """
    if attn_logits_soft_cap is not None:
        raise UnsupportedError("dot_product_attention: attn_logits_soft_cap is there for JAX on TPU only")
    query, key, value = convert_to_tensor(query), convert_to_tensor(key), convert_to_tensor(value)
    if any(len(t.shape) != 4 for t in (query, key, value)):
        raise ValueError(
            "`dot_product_attention` only supports 4D inputs. Received: "
            f"query.shape={tuple(query.shape)}, key.shape={tuple(key.shape)}, value.shape={tuple(value.shape)}."
        )
    dtype = backend.result_type(query.dtype, key.dtype, value.dtype)
    query, key, value = cast(query, dtype), cast(key, dtype), cast(value, dtype)
    heads = query.shape[2]
    if isinstance(scale, TracedArray):
        query, scale = ops.mul(query, cast(scale, dtype)), 1.0
    extra = []
    if mask is not None:
        extra.append(_with_heads(to_bool(mask), heads))
    if bias is not None:
        extra.append(_with_heads(convert_to_tensor(bias, dtype), heads))
    return ops.attention(
        query,
        key,
        value,
        *extra,
        scale=1.0 / math.sqrt(key.shape[-1]) if scale is None else float(scale),
        is_causal=bool(is_causal),
        has_mask=mask is not None,
        has_bias=bias is not None,
    )
