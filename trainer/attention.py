"""Attention: one signature, and the masks it takes, built once per batch.

    positions_BS --decoder_mask--> bool [B, 1, S, S]        causal inside a document
    image_ids_NL --encoder_mask--> bool [B*N, 1, L, L]      both ways inside one frame of one image

`True` means "may attend". The head dimension of a mask is 1: it is shared by all heads and all layers.
Padding attends to padding and to nothing else, so that every softmax has a finite row and no value of the
padding ever reaches a real token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attention(q_BSHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, mask_B1SS: Tensor) -> Tensor:
    """Softmax attention, scale 1/sqrt(K): [B, S, H, K]. Keys and values may have fewer heads (GQA)."""
    groups = q_BSHK.shape[2] // k_BSHK.shape[2]
    if groups > 1:
        # Copied rather than `enable_gqa`, which on CPU is 20 % slower forward and backward (torch 2.13).
        k_BSHK = k_BSHK.repeat_interleave(groups, dim=2)
        v_BSHK = v_BSHK.repeat_interleave(groups, dim=2)
    o_BHSK = scaled_dot_product_attention(
        q_BSHK.transpose(1, 2), k_BSHK.transpose(1, 2), v_BSHK.transpose(1, 2), attn_mask=mask_B1SS
    )
    return o_BHSK.transpose(1, 2)


def decoder_mask(positions_BS: Tensor) -> Tensor:
    """Document-causal mask, bool [B, 1, S, S]. A document begins wherever the position is 0."""
    document_BS = (positions_BS == 0).cumsum(dim=1)
    same_BSS = document_BS[:, :, None] == document_BS[:, None, :]
    index_S = torch.arange(positions_BS.shape[1], device=positions_BS.device)
    return (same_BSS & (index_S[:, None] >= index_S[None, :])).unsqueeze(1)


def encoder_mask(image_ids_NL: Tensor, grid_thw_NL3: Tensor) -> Tensor:
    """Bidirectional mask inside one frame of one image, bool [B*N, 1, L, L]; padding has image id -1."""
    same_NLL = image_ids_NL[:, :, None] == image_ids_NL[:, None, :]
    frame_NL = grid_thw_NL3[..., 0]
    return (same_NLL & (frame_NL[:, :, None] == frame_NL[:, None, :])).unsqueeze(1)
