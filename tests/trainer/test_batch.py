"""Assembly of a microbatch from packs, against batches built by hand."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

from shared.geometry import Budget
from tests.trainer.batches import GEOMETRY, PAD, Document, Picture, make_batch
from tests.trainer.datasets import make_pack
from trainer.data.batch import Batch, assemble_batch, used_tokens

BUDGET = Budget(S=32, N=2, L=24)
P = GEOMETRY.values_per_patch
PACKS: list[list[Document]] = [
    [[Picture(2, 4, seed=1), 7, 8], [9, Picture(4, 4, seed=2), 10]],
    [[11, 12, 13]],
    [[Picture(2, 2, seed=3), 14, Picture(6, 4, seed=4), 15], [16]],
]


def assemble(packs: list[list[Document]], size: int) -> Batch:
    return assemble_batch(
        [make_pack(pack, BUDGET)[0] for pack in packs],
        packs_per_microbatch=size,
        budget=BUDGET,
        values_per_patch=P,
        merge=GEOMETRY.merge,
        pad_token=PAD,
    )


def dirty_empty(shape: tuple[int, ...], dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
    """What `torch.empty` may return: memory that somebody used before."""
    return torch.full(shape, 77, dtype=dtype)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_batch_equals_the_one_built_by_hand(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make_batch(PACKS[:count], BUDGET)
    packs = [make_pack(pack, BUDGET)[0] for pack in PACKS[:count]]
    monkeypatch.setattr(torch, "empty", dirty_empty)
    batch = assemble_batch(
        packs,
        packs_per_microbatch=count,
        budget=BUDGET,
        values_per_patch=P,
        merge=GEOMETRY.merge,
        pad_token=PAD,
    )
    for field in fields(Batch):
        found, wanted = getattr(batch, field.name), getattr(expected, field.name)
        assert found.dtype == wanted.dtype and torch.equal(found, wanted), field.name


def test_missing_packs_are_padding_without_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", dirty_empty)
    batch = assemble(PACKS[:1], size=2)
    assert (batch.labels_BS[1] == -100).all() and (batch.tokens_BS[1] == PAD).all()
    assert torch.equal(batch.positions_BS[1], torch.arange(BUDGET.S, dtype=torch.int32))
    assert (batch.visual_index_BS[1] == -1).all()
    rows = slice(BUDGET.N, 2 * BUDGET.N)
    assert (batch.pixel_values_NLP[rows] == 0).all() and (batch.image_ids_NL[rows] == -1).all()
    assert (batch.grid_thw_NL3[rows] == -1).all() and (batch.image_sizes_NL2[rows] == -1).all()


def test_used_tokens_are_those_of_documents() -> None:
    # 1 + 2 visual + 1 + 2 text + eos = 7 and 1 + 1 + 4 + 1 + 1 + eos = 9
    assert used_tokens(make_pack(PACKS[0], BUDGET)[0], PAD) == 16
    full, _ = make_pack([[5] * 31], BUDGET)  # with its end token 32 = S
    assert used_tokens(full, PAD) == 32


def test_pad_token_inside_text_is_not_counted_as_padding() -> None:
    pack, _ = make_pack([[5, PAD, 6]], BUDGET)
    assert used_tokens(pack, PAD) == 4


def test_pixels_are_copied_not_aliased() -> None:
    pack, _ = make_pack(PACKS[0], BUDGET)
    batch = assemble(PACKS[:1], size=1)
    assert not np.shares_memory(batch.pixel_values_NLP.numpy(), pack.patches_XP)
