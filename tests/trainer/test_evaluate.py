"""Vision gain: what is dealt, what stays, and what the numbers mean."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.dataset import DataSet, open_dataset
from shared.errors import UserError
from shared.geometry import Budget
from shared.schema import Document as StoredDocument
from tests.trainer.batches import GEOMETRY, Document, Picture, make_batch, num_labels, tiny_config
from tests.trainer.datasets import write_dataset
from trainer.config import EvalConfig
from trainer.evaluate import deal_wrong_pictures, describe, evaluate_model, with_pictures
from trainer.models.init import init_parameters
from trainer.models.vlm import VisionLanguageModel
from trainer.parallel.mesh import World

BUDGET = Budget(S=24, N=2, L=24)
PACKS: list[list[Document]] = [
    [[Picture(2, 4, seed=1), 10, 11], [Picture(4, 4, seed=2), 12]],
    [[Picture(2, 4, seed=3), 13]],
    [[Picture(4, 6, seed=4), 14], [15, 16]],
]
WORLD = World(rank=0, size=1, device=torch.device("cpu"), mesh=None)


def dataset_of(tmp_path: Path, packs: list[list[Document]], codec: str = "raw") -> DataSet:
    return open_dataset(write_dataset(tmp_path / f"data-{codec}", {"validation": packs}, BUDGET, codec=codec))


def new_model() -> VisionLanguageModel:
    model = VisionLanguageModel(tiny_config(), GEOMETRY)
    init_parameters(model, tiny_config(), seed=0)
    return model


def test_every_image_gets_the_picture_nearest_in_shape_of_another_document(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, PACKS)
    packs = [dataset.pack("validation", number) for number in range(3)]
    donors = deal_wrong_pictures(dataset, "validation", packs)
    assert donors is not None
    # Sorted by height / width, then area: (0, 0) 2x4, (1, 0) 2x4, (2, 0) 4x6, (0, 1) 4x4; each takes the next.
    found = [[(donor.pack, donor.image) for donor in of_pack] for of_pack in donors]
    assert found == [[(1, 0), (0, 0)], [(2, 0)], [(0, 1)]]


def test_a_picture_of_the_same_document_is_never_dealt(tmp_path: Path) -> None:
    packs = [[[Picture(2, 2, seed=1), 5, Picture(2, 2, seed=2), 6]], [[Picture(6, 4, seed=3), 7]]]
    dataset = dataset_of(tmp_path, packs)
    loaded = [dataset.pack("validation", number) for number in range(2)]
    donors = deal_wrong_pictures(dataset, "validation", loaded)
    assert donors is not None
    assert [(donor.pack, donor.image) for donor in donors[0]] == [(1, 0), (1, 0)]
    assert donors[1][0].pack == 0


def test_wrong_pictures_change_pixels_and_nothing_else(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, PACKS)
    packs = [dataset.pack("validation", number) for number in range(3)]
    donors = deal_wrong_pictures(dataset, "validation", packs)
    assert donors is not None
    changed = with_pictures(packs[0], packs, donors[0], GEOMETRY)
    assert changed.patches_XP.shape == packs[0].patches_XP.shape
    assert np.array_equal(changed.images, packs[0].images)
    assert np.array_equal(changed.tokens_S, packs[0].tokens_S)
    # The first image takes a picture of its own shape: the very patches.
    assert np.array_equal(changed.patches_XP[:8], packs[1].patches_XP)
    assert not np.array_equal(changed.patches_XP[8:], packs[0].patches_XP[8:])


def test_a_picture_of_one_colour_keeps_it_when_it_is_resized(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, PACKS)
    packs = [dataset.pack("validation", number) for number in range(3)]
    colour = np.tile(np.array([10, 200, 60], np.uint8), GEOMETRY.values_per_patch // 3)
    blue = replace(packs[2], stored=np.tile(colour, (len(packs[2].patches_XP), 1)))
    donors = deal_wrong_pictures(dataset, "validation", packs)
    assert donors is not None
    changed = with_pictures(packs[1], [packs[0], packs[1], blue], donors[1], GEOMETRY)
    assert np.array_equal(changed.patches_XP, np.broadcast_to(colour, (8, len(colour))))


def test_loss_is_the_mean_over_labels_and_gain_the_difference(tmp_path: Path) -> None:
    dataset, model = dataset_of(tmp_path, PACKS), new_model()
    values = evaluate_model(model, dataset, EvalConfig(packs=8, packs_per_microbatch=2), WORLD)
    batch = make_batch(PACKS, BUDGET)
    with torch.no_grad():
        expected = model(batch).sum().item() / num_labels(batch)
    assert values["labels"] == num_labels(batch)
    assert values["loss"] == pytest.approx(expected, abs=1e-6)
    assert values["vision_gain"] == pytest.approx(values["loss_wrong_pictures"] - values["loss"], abs=1e-12)
    assert values["vision_gain"] != 0


def test_a_model_that_ignores_pictures_has_no_gain(tmp_path: Path) -> None:
    model = new_model()
    assert model.projector is not None
    with torch.no_grad():
        for parameter in model.projector.parameters():
            parameter.zero_()
    values = evaluate_model(model, dataset_of(tmp_path, PACKS), EvalConfig(packs=8), WORLD)
    assert values["vision_gain"] == 0 and values["loss"] > 0


ONE_WITH_PICTURES: list[list[Document]] = [[[Picture(2, 2), 9, Picture(4, 2), 10], [11, 12]], [[13]]]


@pytest.mark.parametrize("packs", [[[[10, 11, 12]], [[13]]], ONE_WITH_PICTURES])
def test_pictures_in_fewer_than_two_documents_give_a_loss_and_no_gain(
    tmp_path: Path, packs: list[list[Document]]
) -> None:
    model = new_model()
    values = evaluate_model(model, dataset_of(tmp_path, packs), EvalConfig(packs=8), WORLD)
    batch = make_batch(packs, BUDGET)
    with torch.no_grad():
        expected = model(batch).sum().item() / num_labels(batch)
    assert values["loss"] == pytest.approx(expected, abs=1e-6)
    assert values["vision_gain"] is None and values["loss_wrong_pictures"] is None
    first, second = describe(7, values)
    assert first == f"after step 7: loss {expected:.4f}"
    assert second.startswith("vision gain not measurable: ")


def test_documents_of_a_pack_are_read_once_however_many_pictures_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = dataset_of(tmp_path, PACKS)
    packs = [dataset.pack("validation", number) for number in range(3)]
    read, original = [], DataSet.documents

    def counted(self: DataSet, split: str, index: int) -> list[StoredDocument]:
        read.append(index)
        return original(self, split, index)

    monkeypatch.setattr(DataSet, "documents", counted)
    deal_wrong_pictures(dataset, "validation", packs)
    assert read == [0, 1, 2]


def test_evaluation_leaves_the_training_mode_as_it_was(tmp_path: Path) -> None:
    model = new_model().train()
    evaluate_model(model, dataset_of(tmp_path, PACKS), EvalConfig(packs=1), WORLD)
    assert model.training


def test_a_split_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no split 'test' to evaluate on \(it has validation\)"):
        evaluate_model(new_model(), dataset_of(tmp_path, PACKS), EvalConfig(split="test"), WORLD)


def test_a_data_set_of_zstd_gives_the_values_of_raw(tmp_path: Path) -> None:
    model, config = new_model(), EvalConfig(packs=8, packs_per_microbatch=2)
    raw, zstd = (
        evaluate_model(model, dataset_of(tmp_path, PACKS, codec), config, WORLD) for codec in ("raw", "zstd")
    )
    assert raw == zstd and raw["vision_gain"] is not None
