"""Assembly of a microbatch from packs, against batches built by hand."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from shared.codecs import ImageDecoder, image_encoder, store_patches
from shared.errors import UserError
from shared.geometry import Budget
from tests.trainer.batches import GEOMETRY, PAD, Document, Picture, make_batch, with_ends
from tests.trainer.datasets import assemble, make_pack, spans_of
from trainer.data.batch import Batch, BatchShape, assemble_batch
from trainer.data.counts import Counts, count_packs

BUDGET = Budget(S=32, N=2, L=24)
P = GEOMETRY.values_per_patch
PACKS: list[list[Document]] = [
    [[Picture(2, 4, seed=1), 7, 8], [9, Picture(4, 4, seed=2), 10]],
    [[11, 12, 13]],
    [[Picture(2, 2, seed=3), 14, Picture(6, 4, seed=4), 15], [16]],
]


def dirty_empty(shape: tuple[int, ...], dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
    """What `torch.empty` may return: memory that somebody used before."""
    return torch.full(shape, 77, dtype=dtype)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_batch_equals_the_one_built_by_hand(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make_batch(PACKS[:count], BUDGET)
    monkeypatch.setattr(torch, "empty", dirty_empty)
    batch = assemble(PACKS[:count], BUDGET)
    for field in fields(Batch):
        found, wanted = getattr(batch, field.name), getattr(expected, field.name)
        assert found.dtype == wanted.dtype and torch.equal(found, wanted), field.name


def test_missing_packs_are_padding_without_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", dirty_empty)
    batch = assemble(PACKS[:1], BUDGET, packs=2)
    assert (batch.labels_BS[1] == -100).all() and (batch.tokens_BS[1] == PAD).all()
    assert torch.equal(batch.positions_BS[1], torch.arange(BUDGET.S, dtype=torch.int32))
    assert (batch.visual_index_BS[1] == -1).all() and (batch.sources_BS[1] == -1).all()
    rows = slice(BUDGET.N, 2 * BUDGET.N)
    assert (batch.pixel_values_NLP[rows] == 0).all() and (batch.image_ids_NL[rows] == -1).all()
    assert (batch.grid_thw_NL3[rows] == -1).all() and (batch.image_sizes_NL2[rows] == -1).all()


def test_pixels_are_copied_not_aliased() -> None:
    pack, _ = make_pack(PACKS[0], BUDGET)
    batch = assemble(PACKS[:1], BUDGET)
    assert not np.shares_memory(batch.pixel_values_NLP.numpy(), pack.patches_XP)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
def test_ranks_hold_their_part_of_the_rows_and_all_of_the_text(
    parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "empty", dirty_empty)
    whole = make_batch(PACKS, BUDGET)  # 3 packs x 2 rows; with 4 parts of 2 rows, the last two are missing
    found = [assemble(PACKS, BUDGET, row_part=(part, parts)) for part in range(parts)]
    rows = -(-6 // parts)
    for field in fields(Batch):
        own = [getattr(batch, field.name) for batch in found]
        wanted = getattr(whole, field.name)
        if field.name == "frame_ends":  # of the rows that are here
            assert all(torch.equal(batch.frame_ends, with_ends(batch).frame_ends) for batch in found)
            continue
        if field.name.endswith(("_BS", "document_ends")):
            assert all(torch.equal(tensor, wanted) for tensor in own), field.name
            continue
        assert all(len(tensor) == rows for tensor in own), field.name
        padding = 0 if field.name == "pixel_values_NLP" else -1
        together = torch.cat(own)
        assert torch.equal(together[:6], wanted) and (together[6:] == padding).all(), field.name


def test_a_later_stage_of_a_pipeline_has_no_rows() -> None:
    whole, found = make_batch(PACKS, BUDGET), assemble(PACKS, BUDGET, row_part=None)
    for field in fields(Batch):
        own, wanted = getattr(found, field.name), getattr(whole, field.name)
        if field.name.endswith("_BS"):
            assert torch.equal(own, wanted), field.name
        elif "_NL" in field.name:
            assert own.shape == (0, *wanted.shape[1:]), field.name


class Watched(np.ndarray):
    """Patches that remember which of them were asked for."""

    asked: list[slice]

    def __getitem__(self, key: Any) -> Any:
        self.asked.append(key)
        return super().__getitem__(key)


def test_a_rank_touches_only_the_patches_of_its_rows() -> None:
    made = [make_pack(documents, BUDGET) for documents in PACKS]
    for pack, _ in made:
        object.__setattr__(pack, "stored", pack.stored.view(Watched))
        pack.stored.asked = []  # pyright: ignore[reportAttributeAccessIssue]  # a Watched
    shape = BatchShape(packs=3, budget=BUDGET, geometry=GEOMETRY, pad_token=PAD, row_part=(5, 6))
    batch = assemble_batch([pack for pack, _ in made], [spans_of(entries) for _, entries in made], shape)
    assert torch.equal(batch.pixel_values_NLP, make_batch(PACKS, BUDGET).pixel_values_NLP[5:])
    # The sixth row is the second of the third pack: the 24 patches behind those of the 2 x 2 picture.
    # Once to map its pages, once to copy them.
    assert [pack.stored.asked for pack, _ in made] == [[], [], [slice(4, 28)] * 2]


@pytest.mark.parametrize("codec", ["zstd", "jpeg"])
def test_a_rank_decodes_only_the_images_of_its_rows(codec: str) -> None:
    decoded: list[int] = []
    pack, entries = make_pack(PACKS[2], BUDGET)
    coded = pack.images.copy()
    stored = store_patches(pack.stored, coded, image_encoder(codec, GEOMETRY, jpeg_quality=95, zstd_level=1))

    def record(frame: np.ndarray, t: int, h: int, w: int, out: np.ndarray) -> None:
        decoded.append(h * w)
        out[...] = 5

    pack = replace(pack, stored=stored, images=coded, decoder=ImageDecoder(GEOMETRY, record))
    for part in range(2):
        shape = BatchShape(packs=1, budget=BUDGET, geometry=GEOMETRY, pad_token=PAD, row_part=(part, 2))
        batch = assemble_batch([pack], [spans_of(entries)], shape)
        assert int((batch.pixel_values_NLP == 5).all(dim=-1).sum()) == decoded[-1]
    assert decoded == [4, 24]


def test_every_position_knows_the_source_of_its_document() -> None:
    pack, entries = make_pack(PACKS[0], BUDGET)
    entries = [replace(entries[0], source="web"), replace(entries[1], source="chat")]
    shape = BatchShape(packs=1, budget=BUDGET, geometry=GEOMETRY, pad_token=PAD)
    batch = assemble_batch([pack], [spans_of(entries, ["chat", "web"])], shape)
    # [begin, 2 x image, end, 7, 8, eos] and [9, begin, 4 x image, end, 10, eos]
    assert batch.sources_BS[0].tolist() == [1] * 7 + [0] * 9 + [-1] * 16


def test_a_row_of_more_frames_than_the_encoder_has_slots_for_is_refused() -> None:
    packs: list[list[Document]] = [
        [[Picture(2, 2), Picture(2, 2), 5]],
        [[Picture(2, 2, t=3), Picture(2, 2), 6]],
    ]
    assemble(packs, BUDGET, frames_per_row=4)
    with pytest.raises(
        UserError,
        match=r"vision row 0 holds 4 images .* slots for 3; set encoder\.frames_per_row to at least 4",
    ):
        assemble(packs, BUDGET, frames_per_row=3, row_part=(0, 4))  # the row is another rank's


def test_counts_are_of_documents_and_images() -> None:
    made = [make_pack(documents, BUDGET) for documents in [*PACKS, [[Picture(2, 2, t=2), 5]]]]
    sources = [("web", "chat"), ("chat",), ("web", "web"), ("video",)]
    entries = [
        [replace(entry, source=name) for entry, name in zip(own, names, strict=True)]
        for (_, own), names in zip(made, sources, strict=True)
    ]
    spans = [spans_of(own, ["chat", "video", "web"]) for own in entries]
    counts = count_packs([pack for pack, _ in made], spans, 3)
    # Tokens: begin, end and eos beside text, and a quarter of the patches: 7, 9 | 4 | 14, 2 | 6.
    # Labels: text and eos, less one where text comes first: 3, 2 | 3 | 3, 1 | 2.
    assert counts.to_list() == [
        3 + 2 + 3 + 3 + 1 + 2,
        7 + 9 + 4 + 14 + 2 + 6,
        8 + 16 + 4 + 24 + 2 * 4,
        5,
        6,
        7**2 + 9**2 + 4**2 + 14**2 + 2**2 + 6**2,
        8**2 + 16**2 + 4**2 + 24**2 + 2 * 4**2,
        2 + 3,
        2,
        3 + 3 + 1,
    ]
    assert Counts.from_list(counts.to_list()).to_list() == counts.to_list()
