"""Masks, written out by hand."""

from __future__ import annotations

import torch

from trainer.attention import attention, decoder_mask, encoder_mask


def test_decoder_mask_is_causal_inside_each_document() -> None:
    # Documents of 2 and 1 tokens and 2 of padding, which is a document of its own.
    mask = decoder_mask(torch.tensor([[0, 1, 0, 0, 1]]))
    expected = torch.tensor(
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]],
        dtype=torch.bool,
    )
    assert torch.equal(mask, expected[None, None])


def test_encoder_mask_joins_one_frame_of_one_image() -> None:
    # Image 0 of two patches, image 1 of two frames of one patch, one of padding.
    grid = torch.tensor([[[0, 0, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0], [-1, -1, -1]]])
    mask = encoder_mask(torch.tensor([[0, 0, 1, 1, -1]]), grid)
    expected = torch.eye(5, dtype=torch.bool)
    expected[0, 1] = expected[1, 0] = True
    assert torch.equal(mask, expected[None, None])


def test_attention_shares_key_heads_among_groups_of_query_heads() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 5, 4, 6), torch.randn(2, 5, 2, 6), torch.randn(2, 5, 2, 6)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    ours = attention(q, k, v, mask)
    for head in range(4):
        shared = head // 2
        score = q[:, :, head] @ k[:, :, shared].transpose(1, 2) / 6**0.5
        weight = score.masked_fill(~mask[:, 0], float("-inf")).softmax(-1)
        assert torch.allclose(ours[:, :, head], weight @ v[:, :, shared], atol=1e-6)
