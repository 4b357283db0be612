"""Vision gain: what is dealt, what stays, and what the numbers mean."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from shared.dataset import DataSet, open_dataset
from shared.errors import UserError
from shared.geometry import Budget
from shared.schema import Pack
from tests.trainer.batches import GEOMETRY, Document, Picture, make_batch, num_labels, tiny_config
from tests.trainer.datasets import write_dataset
from trainer.config import EvalConfig
from trainer.data.batch import Batch
from trainer.data.mixture import Mixture, open_mixture, single
from trainer.data.wrong_pictures import Donor, deal_wrong_pictures, with_pictures
from trainer.evaluate import Forward, Values, describe, evaluate
from trainer.models.init import init_parameters
from trainer.models.vlm import VisionLanguageModel
from trainer.parallel.mesh import World
from trainer.parallel.parallelize import ParallelModel
from trainer.step import forward

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


def deal(dataset: DataSet, packs: list[Pack]) -> list[list[Donor]] | None:
    return deal_wrong_pictures(packs, [dataset.document_spans("validation", n) for n in range(len(packs))])


def nll_per_source(model: VisionLanguageModel, num_sources: int) -> Forward:
    parts = ParallelModel(parts=[model])
    return lambda batches: forward(parts, batches, WORLD, num_sources=num_sources)


def evaluate_model(
    model: VisionLanguageModel, dataset: DataSet, config: EvalConfig, world: World = WORLD
) -> Values:
    return evaluate(nll_per_source(model, len(dataset.sources)), single(dataset), config, world)


def test_every_image_gets_the_picture_nearest_in_shape_of_another_document(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, PACKS)
    packs = [dataset.pack("validation", number) for number in range(3)]
    donors = deal(dataset, packs)
    assert donors is not None
    # Sorted by height / width, then area: (0, 0) 2x4, (1, 0) 2x4, (2, 0) 4x6, (0, 1) 4x4; each takes the next.
    found = [[(donor.pack, donor.image) for donor in of_pack] for of_pack in donors]
    assert found == [[(1, 0), (0, 0)], [(2, 0)], [(0, 1)]]


def test_a_picture_of_the_same_document_is_never_dealt(tmp_path: Path) -> None:
    packs = [[[Picture(2, 2, seed=1), 5, Picture(2, 2, seed=2), 6]], [[Picture(6, 4, seed=3), 7]]]
    dataset = dataset_of(tmp_path, packs)
    loaded = [dataset.pack("validation", number) for number in range(2)]
    donors = deal(dataset, loaded)
    assert donors is not None
    assert [(donor.pack, donor.image) for donor in donors[0]] == [(1, 0), (1, 0)]
    assert donors[1][0].pack == 0


def test_wrong_pictures_change_pixels_and_nothing_else(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, PACKS)
    packs = [dataset.pack("validation", number) for number in range(3)]
    donors = deal(dataset, packs)
    assert donors is not None
    changed = with_pictures(packs[0], packs, donors[0], GEOMETRY, range(2))
    assert changed.patches_XP.shape == packs[0].patches_XP.shape
    assert np.array_equal(changed.images, packs[0].images)
    assert np.array_equal(changed.tokens_S, packs[0].tokens_S)
    # The first image takes a picture of its own shape: the very patches.
    assert np.array_equal(changed.patches_XP[:8], packs[1].patches_XP)
    assert not np.array_equal(changed.patches_XP[8:], packs[0].patches_XP[8:])
    # Both pictures lie in row 0: a rank that has row 1 makes none.
    assert not with_pictures(packs[0], packs, donors[0], GEOMETRY, range(1, 2)).patches_XP.any()


def test_a_picture_of_one_colour_keeps_it_when_it_is_resized(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, PACKS)
    packs = [dataset.pack("validation", number) for number in range(3)]
    colour = np.tile(np.array([10, 200, 60], np.uint8), GEOMETRY.values_per_patch // 3)
    blue = replace(packs[2], stored=np.tile(colour, (len(packs[2].patches_XP), 1)))
    donors = deal(dataset, packs)
    assert donors is not None
    changed = with_pictures(packs[1], [packs[0], packs[1], blue], donors[1], GEOMETRY, range(2))
    assert np.array_equal(changed.patches_XP, np.broadcast_to(colour, (8, len(colour))))


def test_loss_is_the_mean_over_labels_and_gain_the_difference(tmp_path: Path) -> None:
    dataset, model = dataset_of(tmp_path, PACKS), new_model()
    values = evaluate_model(model, dataset, EvalConfig(packs=8, packs_per_microbatch=2))
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
    values = evaluate_model(model, dataset_of(tmp_path, PACKS), EvalConfig(packs=8))
    assert values["vision_gain"] == 0 and values["loss"] > 0


ONE_WITH_PICTURES: list[list[Document]] = [[[Picture(2, 2), 9, Picture(4, 2), 10], [11, 12]], [[13]]]


@pytest.mark.parametrize("packs", [[[[10, 11, 12]], [[13]]], ONE_WITH_PICTURES])
def test_pictures_in_fewer_than_two_documents_give_a_loss_and_no_gain(
    tmp_path: Path, packs: list[list[Document]]
) -> None:
    model = new_model()
    values = evaluate_model(model, dataset_of(tmp_path, packs), EvalConfig(packs=8))
    batch = make_batch(packs, BUDGET)
    with torch.no_grad():
        expected = model(batch).sum().item() / num_labels(batch)
    assert values["loss"] == pytest.approx(expected, abs=1e-6)
    assert values["vision_gain"] is None and values["loss_wrong_pictures"] is None
    first, second, third = describe(7, values)
    assert first == f"after step 7: loss {expected:.4f}"
    assert second.startswith("vision gain not measurable: ")
    assert third == f"  of {values['tokens']:.0f} tokens and {values['images']:.0f} images"


def test_evaluation_leaves_the_training_mode_as_it_was(tmp_path: Path) -> None:
    model = new_model().train()
    evaluate_model(model, dataset_of(tmp_path, PACKS), EvalConfig(packs=1))
    assert model.training


def test_a_split_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no split 'test' to evaluate on \(it has validation\)"):
        evaluate_model(new_model(), dataset_of(tmp_path, PACKS), EvalConfig(split="test"))


def test_a_data_set_of_zstd_gives_the_values_of_raw(tmp_path: Path) -> None:
    model, config = new_model(), EvalConfig(packs=8, packs_per_microbatch=2)
    raw, zstd = (
        evaluate_model(model, dataset_of(tmp_path, PACKS, codec), config) for codec in ("raw", "zstd")
    )
    assert raw == zstd and raw["vision_gain"] is not None


def test_losses_and_gains_are_given_per_source(tmp_path: Path) -> None:
    text: list[list[Document]] = [[[10, 11, 12], [13, 14]], [[15, 16]]]
    paths = {"pictures": PACKS, "text": text}
    mixture = open_mixture(
        {
            name: (write_dataset(tmp_path / name, {"validation": packs}, BUDGET, sources=(name[0],)), 1)
            for name, packs in paths.items()
        }
    )
    model = new_model()
    values = evaluate(nll_per_source(model, 2), mixture, EvalConfig(packs=9, packs_per_microbatch=2), WORLD)
    for name, packs in paths.items():
        batch = make_batch(packs, BUDGET)
        with torch.no_grad():
            expected = model(batch).sum().item() / num_labels(batch)
        assert values[f"loss/{name}/{name[0]}"] == pytest.approx(expected, abs=1e-6)
    assert values["vision_gain/text/t"] is None
    gain, alone = values["vision_gain/pictures/p"], num_labels(make_batch(PACKS, BUDGET))
    assert gain is not None and values["labels"] is not None
    assert values["vision_gain"] == pytest.approx(gain * alone / values["labels"], abs=1e-9)
    # Begin, end and eos beside text, and a quarter of the patches: 7, 8 | 6 | 10, 3, and 4, 3, 3 of text.
    assert (values["tokens"], values["images"]) == (34 + 10, 4)
    lines = describe(3, values)
    assert lines[2] == f"  pictures/p: loss {values['loss/pictures/p']:.4f}, vision gain {gain:.4f}"
    assert lines[3] == f"  text/t: loss {values['loss/text/t']:.4f}"


def run_on(
    data: Mixture, *, dp_size: int, cp_size: int, microbatches: int
) -> dict[tuple[int, int], list[list[Batch]]]:
    """What each rank gives to its forward, call by call."""
    calls: dict[tuple[int, int], list[list[Batch]]] = {}
    for rank in itertools.product(range(dp_size), range(cp_size)):
        calls[rank] = []

        def record(batches: Sequence[Batch], own: list[list[Batch]] = calls[rank]) -> torch.Tensor:
            own.append(list(batches))
            return torch.zeros(1)

        world: Any = SimpleNamespace(
            dp_rank=rank[0], dp_size=dp_size, device=WORLD.device, sum_on_device=lambda values: values
        )
        config = EvalConfig(packs=8, packs_per_microbatch=1)
        evaluate(record, data, config, world, row_part=(rank[1], cp_size), microbatches=microbatches)
    return calls


@pytest.mark.parametrize(("dp_size", "cp_size", "microbatches"), [(2, 1, 1), (3, 1, 2), (1, 2, 1), (2, 4, 3)])
def test_ranks_together_see_what_one_sees(
    tmp_path: Path, dp_size: int, cp_size: int, microbatches: int
) -> None:
    data = single(dataset_of(tmp_path, PACKS))
    one = run_on(data, dp_size=1, cp_size=1, microbatches=1)
    many = run_on(data, dp_size=dp_size, cp_size=cp_size, microbatches=microbatches)
    rounds = 2 * -(-3 // (dp_size * microbatches))  # three packs, with right and with wrong pictures
    assert [list(map(len, calls)) for calls in many.values()] == [[microbatches] * rounds] * len(many)

    def texts(ranks: dict[tuple[int, int], list[list[Batch]]]) -> list[list[int]]:
        first = [
            batch for (_, cp_rank), calls in ranks.items() if not cp_rank for batch in itertools.chain(*calls)
        ]
        return sorted(batch.tokens_BS[0].tolist() for batch in first if (batch.sources_BS >= 0).any())

    def pixels(ranks: dict[tuple[int, int], list[list[Batch]]]) -> int:
        return sum(int(b.pixel_values_NLP.sum()) for calls in ranks.values() for b in itertools.chain(*calls))

    assert texts(many) == texts(one) and len(texts(one)) == 6
    assert pixels(many) == pixels(one) > 0
