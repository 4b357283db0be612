"""Masks, written out by hand, and the borders that varlen attention takes in their place."""

from __future__ import annotations

import pytest
import torch

from shared.geometry import Budget
from tests.trainer.batches import Picture, make_batch
from trainer.attention import Bounds, KeyOrder, attention, document_mask, segment_mask
from trainer.models.vision import frame_segments


def test_document_mask_is_causal_inside_each_document() -> None:
    # Documents of 2 and 1 tokens and 2 of padding, which is a document of its own.
    mask = document_mask(torch.tensor([[0, 1, 0, 0, 1]]))
    expected = torch.tensor(
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]],
        dtype=torch.bool,
    )
    assert torch.equal(mask, expected[None, None])


def test_document_mask_of_some_queries_has_their_rows_and_the_keys_in_their_order() -> None:
    positions, order = torch.tensor([[0, 1, 0, 1, 2, 3]]), [0, 5, 1, 4, 2, 3]
    whole = document_mask(positions)
    part = document_mask(positions, order=KeyOrder(query_S=torch.tensor([1, 4]), key_S=torch.tensor(order)))
    assert torch.equal(part, whole[:, :, [1, 4]][..., order])


def test_segment_mask_joins_one_frame_of_one_image() -> None:
    # Image 0 of two patches, image 1 of two frames of one patch, one of padding.
    grid = torch.tensor([[[0, 0, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0], [-1, -1, -1]]])
    mask = segment_mask(frame_segments(torch.tensor([[0, 0, 1, 1, -1]]), grid))
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


def test_the_dense_mask_has_one_head_for_all() -> None:
    assert document_mask(torch.zeros(3, 8)).shape == (3, 1, 8, 8)


@pytest.mark.parametrize("kind", ["document", "frame"])
def test_borders_for_varlen_say_what_the_dense_mask_says(kind: str) -> None:
    packs = [[[7, 8, Picture(4, 2), 9], [Picture(2, 2, t=2, seed=1), 5]], [[6], [7, 8, 9, Picture(2, 2)]]]
    batch = make_batch(packs, Budget(S=24, N=2, L=16))
    if kind == "document":
        dense = document_mask(batch.positions_BS)
        bounds = document_mask(batch.positions_BS, "varlen", ends=batch.document_ends)
    else:
        segments = frame_segments(batch.image_ids_NL, batch.grid_thw_NL3)
        dense = segment_mask(segments)
        bounds = segment_mask(segments, "varlen", ends=batch.frame_ends)
    assert isinstance(bounds, Bounds) and isinstance(dense, torch.Tensor)
    # The mask that flash attention makes of the borders: all rows end to end, each segment a square block.
    sizes = bounds.ends.diff().tolist()
    assert min(sizes) > 0 and max(sizes) <= bounds.longest and sum(sizes) == dense.shape[0] * dense.shape[-1]
    blocks = torch.block_diag(*(torch.ones(size, size) for size in sizes)).bool()
    blocks = blocks.tril() if bounds.causal else blocks
    assert torch.equal(blocks, torch.block_diag(*dense[:, 0].int()).bool())
