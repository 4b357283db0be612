"""Several data sets as one: numbers, sources, order, and what cannot be mixed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.dataset import open_dataset
from shared.errors import UserError
from shared.geometry import Budget
from tests.trainer.batches import GEOMETRY, Document, Picture
from tests.trainer.datasets import TOKENS, write_dataset
from trainer.data.mixture import Mixture, exact_quotas, open_mixture, single

BUDGET = Budget(S=16, N=1, L=16)


def packs_of(first: int, count: int) -> list[list[Document]]:
    return [[[Picture(2, 2, seed=first + n), first + n], [first + n, 9]] for n in range(count)]


@pytest.fixture
def web(tmp_path: Path) -> Path:
    splits = {"train": packs_of(10, 6), "validation": packs_of(5, 4)}
    return write_dataset(tmp_path / "web", splits, BUDGET, sources=("b", "a"))


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    splits = {"train": packs_of(30, 4), "validation": packs_of(25, 1)}
    return write_dataset(tmp_path / "chat", splits, BUDGET, codec="zstd", sources=("a",))


@pytest.fixture
def mixture(web: Path, chat: Path) -> Mixture:
    return open_mixture({"web": (web, 0.75), "chat": (chat, 0.25)})


def first_token(mixture: Mixture, split: str, number: int) -> int:
    """The text token that tells the packs apart: behind begin, image and end."""
    return int(mixture.pack(split, number).tokens_S[3])


def test_packs_are_numbered_over_the_data_sets_in_the_order_of_their_names(mixture: Mixture) -> None:
    assert mixture.names == ["chat", "web"]
    assert (mixture.num_packs("train"), mixture.num_packs("validation")) == (10, 5)
    assert [first_token(mixture, "train", n) for n in range(10)] == [30, 31, 32, 33, 10, 11, 12, 13, 14, 15]
    costs = mixture.costs("train", np.array([9, 0, 4]))
    assert costs.tolist() == [mixture.pack("train", n).cost for n in (9, 0, 4)]


def test_sources_carry_the_name_of_their_data_set_where_there_are_several(
    mixture: Mixture, web: Path
) -> None:
    assert mixture.sources == ["chat/a", "web/a", "web/b"]
    assert [mixture.document_spans("train", n)["source"].tolist() for n in (0, 3, 4, 5)] == [
        [0, 0],
        [0, 0],
        [2, 2],  # packs of web are of b and a in turn
        [1, 1],
    ]
    assert single(open_dataset(web)).sources == ["a", "b"]


@pytest.mark.parametrize("seed", [0, 7])
def test_one_data_set_goes_through_permutations_of_its_packs(web: Path, seed: int) -> None:
    data = single(open_dataset(web))
    order = np.concatenate([data.packs_of_step("train", 4, seed, step) for step in range(3)])
    epochs = [np.random.default_rng([seed, epoch]).permutation(6) for epoch in range(2)]
    assert order.tolist() == np.concatenate(epochs).tolist()


def test_each_data_set_has_its_share_and_its_own_epochs(mixture: Mixture) -> None:
    steps = [mixture.packs_of_step("train", 4, 3, step) for step in range(24)]
    assert all((of_step < 4).sum() == 1 for of_step in steps), "one of four packs is of chat"
    order = np.concatenate(steps)
    for own, size in ((order[order < 4], 4), (order[order >= 4] - 4, 6)):
        epochs = own[: len(own) // size * size].reshape(-1, size)
        assert (np.sort(epochs, axis=1) == np.arange(size)).all()
        assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1


def test_data_sets_of_one_size_are_not_shuffled_alike(web: Path) -> None:
    mixture = open_mixture({"a": (web, 1), "b": (web, 1)})
    order = mixture.packs_of_step("train", 12, 0, 0)
    assert order[order < 6].tolist() != (order[order >= 6] - 6).tolist()


def test_a_step_is_the_same_whatever_was_asked_before(mixture: Mixture, web: Path, chat: Path) -> None:
    for step in range(9):
        mixture.packs_of_step("train", 4, 0, step)
    fresh = open_mixture({"chat": (chat, 1), "web": (web, 3)})  # the same shares, written otherwise
    for step in (1000, 7):
        expected = fresh.packs_of_step("train", 4, 0, step).tolist()
        assert mixture.packs_of_step("train", 4, 0, step).tolist() == expected


def test_evaluation_takes_the_first_packs_in_the_shares_and_then_what_is_left(mixture: Mixture) -> None:
    # web web chat web | web; in the split, chat has pack 0 and web packs 1 to 4.
    assert [mixture.first_packs("validation", count).tolist() for count in (1, 3, 4, 99)] == [
        [1],
        [1, 0, 2],
        [1, 0, 2, 3],
        [1, 0, 2, 3, 4],
    ]


def test_the_identity_is_that_of_the_data_sets_and_their_shares(
    mixture: Mixture, web: Path, chat: Path
) -> None:
    def identity(**weights: float) -> str:
        return open_mixture({"chat": (chat, weights["chat"]), "web": (web, weights["web"])}).identity

    assert identity(chat=1, web=3) == mixture.identity != identity(chat=1, web=2)
    assert open_mixture({"chat": (chat, 1), "other": (web, 3)}).identity != mixture.identity
    assert single(open_dataset(web)).identity == open_dataset(web).identity


def test_the_description_says_how_often_each_is_repeated(mixture: Mixture, web: Path, chat: Path) -> None:
    assert mixture.describe("train", 40) == [
        f"chat: 25.00% of packs, 4 packs in split train of {chat}; the run takes 10 of them, 2.50 epochs",
        f"web: 75.00% of packs, 6 packs in split train of {web}; the run takes 30 of them, 5.00 epochs",
    ]
    (line,) = single(open_dataset(web)).describe("train", 40)
    assert line == f"6 packs in split train of {web}; the run takes 40 of them, 6.67 epochs"


def test_packs_are_shown_by_data_set(mixture: Mixture, web: Path) -> None:
    assert mixture.show_packs("train", np.array([9, 2, 4])) == "chat: 2; web: 5, 0"
    assert single(open_dataset(web)).show_packs("train", np.arange(10) % 6) == (
        "0, 1, 2, 3, 4, 5, 0, 1 and 2 more"
    )


@pytest.mark.parametrize(
    ("weights", "quotas"),
    [
        ((0.7, 0.3), [7, 3]),
        ((1, 1, 1), [1, 1, 1]),
        ((0.1, 0.25), [2, 5]),
        ((2,), [1]),
        ((1e-3, 1), [1, 1000]),
    ],
)
def test_quotas_are_the_weights_exactly(weights: tuple[float, ...], quotas: list[int]) -> None:
    assert exact_quotas({str(n): weight for n, weight in enumerate(weights)}) == quotas


@pytest.mark.parametrize(
    ("weight", "complaint"),
    [
        (0.0, r"mixture\.b\.weight is 0\.0; give a number above 0"),
        (float("nan"), r"mixture\.b\.weight is nan"),
        (1 / 3, "round them to fewer digits"),
    ],
)
def test_weights_that_are_no_shares_are_refused(weight: float, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        exact_quotas({"a": 1.0, "b": weight})


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"budget": Budget(S=16, N=1, L=32)}, r"budget\.L is 16 in .*web, 32 in .*other"),
        ({"geometry": replace(GEOMETRY, mean=(0.1, 0.5, 0.5))}, r"geometry\.mean is .*web, .*other"),
        ({"tokens": replace(TOKENS, eos=9)}, r"tokens\.eos is 4 in .*web, 9 in .*other"),
    ],
)
def test_data_sets_that_disagree_are_refused_by_the_key(
    web: Path, tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    settings = {"budget": BUDGET, **changes}
    other = write_dataset(tmp_path / "other", {"train": packs_of(10, 2)}, **settings)
    with pytest.raises(UserError, match=complaint):
        open_mixture({"a": (web, 1), "b": (other, 1)})


def test_a_split_without_packs_is_named(web: Path, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", {"validation": packs_of(10, 2)}, BUDGET)
    mixture = open_mixture({"a": (web, 1), "b": (other, 1)})
    with pytest.raises(UserError, match=r"data set .*other: has no packs in split 'train'"):
        mixture.packs_of_step("train", 4, 0, 0)
    with pytest.raises(UserError, match=r"data set .*other: has no packs in split 'train'"):
        mixture.describe("train", 4)
    with pytest.raises(UserError, match="no split 'trian'; did you mean 'train'"):
        mixture.num_packs("trian")
