"""Attention: one signature, three backends, and the masks they take, built once per batch.

    positions_BS --document_mask--> causal inside a document       (decoder)
    segments_NX  --segment_mask---> both ways inside a segment     (encoder: one frame of one image)

    backend  mask                                  where
    sdpa     dense [B, 1, Q, K]                    anywhere; shared by all heads, but Q x K values
    flex     BlockMask: only the tiles in use      CUDA (FlexAttention has no backward on a CPU)
    varlen   the segments' borders                 CUDA, flash attention, bfloat16; not under context parallelism

Padding attends to padding and to nothing else, so that every softmax has a finite row and no value of the
padding ever reaches a real token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

Backend = Literal["sdpa", "flex", "varlen"]


class Bounds(NamedTuple):
    """Segments of a batch laid end to end: `ends[i] .. ends[i + 1]`, in positions of all rows together."""

    ends: Tensor
    """int32 [segments + 1]: the first is 0, the last the number of positions of all rows."""
    longest: int
    """No segment is longer."""
    causal: bool


Mask = Tensor | BlockMask | Bounds


def attention(q_BSHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, mask: Mask) -> Tensor:
    """Softmax attention, scale 1/sqrt(K): [B, S, H, K]. Keys and values may have fewer heads (GQA)."""
    if isinstance(mask, BlockMask):
        q, k, v = (x.transpose(1, 2) for x in (q_BSHK, k_BSHK, v_BSHK))
        return _compiled_flex()(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)
    groups = q_BSHK.shape[2] // k_BSHK.shape[2]
    if groups > 1:
        # Copied rather than `enable_gqa`, which on CPU is 20 % slower forward and backward (torch 2.13), and which
        # varlen has not in torch 2.11.
        k_BSHK = k_BSHK.repeat_interleave(groups, dim=2)
        v_BSHK = v_BSHK.repeat_interleave(groups, dim=2)
    if isinstance(mask, Bounds):
        return _varlen(q_BSHK, k_BSHK, v_BSHK, mask)
    o_BHSK = scaled_dot_product_attention(
        q_BSHK.transpose(1, 2), k_BSHK.transpose(1, 2), v_BSHK.transpose(1, 2), attn_mask=mask
    )
    return o_BHSK.transpose(1, 2)


def _varlen(q_BSHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, mask: Bounds) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x.flatten(0, 1) for x in (q_BSHK, k_BSHK, v_BSHK))
    window = (-1, 0) if mask.causal else (-1, -1)
    o = varlen_attn(q, k, v, mask.ends, mask.ends, mask.longest, mask.longest, window_size=window)
    assert isinstance(o, Tensor)
    return o.view_as(q_BSHK)


class KeyOrder(NamedTuple):
    """Where queries and keys stand in the sequence, when a rank has a part of it (trainer.parallel.context)."""

    query_S: Tensor
    """int64: position of each query."""
    key_S: Tensor
    """int64: position of each key."""


def document_mask(
    positions_BS: Tensor,
    backend: Backend = "sdpa",
    *,
    ends: Tensor | None = None,
    order: KeyOrder | None = None,
) -> Mask:
    """Document-causal mask over whole packs. A document begins wherever the position is 0.

    `ends` are the borders of documents and padding (`Bounds.ends`), which varlen takes instead of positions.
    """
    if backend == "varlen":
        assert ends is not None and order is None, "varlen attention has no queries without their keys"
        return _bounds(ends, positions_BS.shape[1], causal=True)
    document_BS = (positions_BS == 0).cumsum(dim=1)
    if order is None:
        index_S = torch.arange(positions_BS.shape[1], device=positions_BS.device)
        order = KeyOrder(index_S, index_S)
    query_BS, key_BS = document_BS[:, order.query_S], document_BS[:, order.key_S]
    if backend == "sdpa":
        same_BQK = query_BS[:, :, None] == key_BS[:, None, :]
        return (same_BQK & (order.query_S[:, None] >= order.key_S[None, :])).unsqueeze(1)
    query_S, key_S = order

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (query_BS[b, q] == key_BS[b, k]) & (query_S[q] >= key_S[k])

    return _block_mask(allowed, query_BS, key_BS.shape[1])


def segment_mask(segments_NX: Tensor, backend: Backend = "sdpa", *, ends: Tensor | None = None) -> Mask:
    """Bidirectional mask inside each segment of a row: positions that have the same number see each other."""
    if backend == "varlen":
        assert ends is not None
        return _bounds(ends, segments_NX.shape[1], causal=False)
    if backend == "sdpa":
        return (segments_NX[:, :, None] == segments_NX[:, None, :]).unsqueeze(1)

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return segments_NX[b, q] == segments_NX[b, k]

    return _block_mask(allowed, segments_NX, segments_NX.shape[1])


def _bounds(ends: Tensor, longest: int, *, causal: bool) -> Bounds:
    # Their number is the one size that differs from batch to batch: compiled layers are not to be compiled anew for it.
    torch._dynamo.maybe_mark_dynamic(ends, 0)
    return Bounds(ends, longest, causal)


def as_summand(mask: Mask, dtype: torch.dtype) -> Mask:
    """A dense mask as what is added to scores of `dtype`, 0 or -inf; other masks as they are.

    Of bools sdpa makes this in every layer, and keeps it until backward.
    """
    if not isinstance(mask, Tensor):
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def _block_mask(allowed: Callable[..., Tensor], queries: Tensor, num_keys: int) -> BlockMask:
    num_rows, num_queries = queries.shape
    return _compiled_block_mask()(allowed, num_rows, None, num_queries, num_keys, device=queries.device)


@cache
def _compiled_flex() -> Any:
    """Uncompiled, FlexAttention computes all Q x K scores."""
    return torch.compile(flex_attention, dynamic=False)


@cache
def _compiled_block_mask() -> Any:
    """Uncompiled, it builds all Q x K bools first."""
    return torch.compile(create_block_mask, dynamic=False)
