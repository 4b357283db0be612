"""The loader: the same steps for any number of ranks and from any start."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.dataset import open_dataset
from shared.errors import UserError
from shared.geometry import Budget
from tests.trainer.batches import Document, Picture
from tests.trainer.datasets import write_dataset
from trainer.data.batch import Batch, BatchShape, assemble_batch
from trainer.data.loader import STEPS_AHEAD, Loader, Step
from trainer.data.mixture import single
from trainer.data.order import deal_packs

BUDGET = Budget(S=16, N=1, L=16)
PACKS: list[list[Document]] = [[[Picture(2, 2, seed=n), 10 + n], [20 + n]] for n in range(10)]


@pytest.fixture
def dataset_path(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", {"train": PACKS}, BUDGET)


def new_loader(path: Path, *, device: str = "cpu", **settings: Any) -> Loader:
    """Steps from 0 on for one rank, `settings` on top."""
    defaults = {
        "seed": 0,
        "packs_per_microbatch": 1,
        "accumulation": 1,
        "dp_rank": 0,
        "dp_size": 1,
        "decode_threads": 2,
    }
    merged: dict[str, Any] = {**defaults, "start_step": 0, **settings}
    return Loader(single(open_dataset(path)), split="train", device=torch.device(device), **merged)


def load(
    path: Path,
    count: int,
    *,
    start: int = 0,
    rank: int = 0,
    ranks: int = 1,
    accumulation: int = 1,
    decode_threads: int = 2,
) -> list[Step]:
    loader = new_loader(
        path,
        seed=3,
        packs_per_microbatch=4 // (ranks * accumulation),
        accumulation=accumulation,
        dp_rank=rank,
        dp_size=ranks,
        start_step=start,
        decode_threads=decode_threads,
    )
    try:
        return list(itertools.islice(loader, count))
    finally:
        loader.close()


def texts(steps: list[Step]) -> list[Counter[int]]:
    """Of each step, the text tokens 10..29, which name the packs."""
    tokens = [torch.cat([b.tokens_BS.flatten() for b in step.microbatches]).tolist() for step in steps]
    return [Counter(token for token in of_step if 10 <= token < 30) for of_step in tokens]


def test_starting_late_gives_the_same_steps(dataset_path: Path) -> None:
    whole, late = load(dataset_path, 7), load(dataset_path, 3, start=4)
    assert [step.index for step in late] == [4, 5, 6]
    for a, b in zip(whole[4:], late, strict=True):
        for field in fields(Batch):
            assert torch.equal(getattr(a.microbatches[0], field.name), getattr(b.microbatches[0], field.name))


@pytest.mark.parametrize(("ranks", "accumulation"), [(2, 1), (1, 2), (4, 1), (2, 2)])
def test_a_global_batch_is_the_same_packs_on_any_layout(
    dataset_path: Path, ranks: int, accumulation: int
) -> None:
    single = texts(load(dataset_path, 5))
    parts = [
        texts(load(dataset_path, 5, rank=rank, ranks=ranks, accumulation=accumulation))
        for rank in range(ranks)
    ]
    assert [sum(of_step, Counter()) for of_step in zip(*parts, strict=True)] == single


@pytest.mark.parametrize("row_part", [(0, 2), (1, 2)])
def test_ranks_of_one_data_rank_share_its_packs_and_its_counts(
    dataset_path: Path, row_part: tuple[int, int]
) -> None:
    settings = {"packs_per_microbatch": 4, "frames_per_row": 1}
    loaders = [new_loader(dataset_path, row_part=part, **settings) for part in ((0, 1), row_part)]
    (whole, part) = (next(iter(loader)) for loader in loaders)
    for loader in loaders:
        loader.close()
    assert part.counts.to_list() == whole.counts.to_list()
    rows = slice(2 * row_part[0], 2 * row_part[0] + 2)
    (of_part,), (of_whole,) = part.microbatches, whole.microbatches
    assert torch.equal(of_part.tokens_BS, of_whole.tokens_BS)
    assert torch.equal(of_part.pixel_values_NLP, of_whole.pixel_values_NLP[rows])


def test_counts_are_of_useful_labels_tokens_and_patches(dataset_path: Path) -> None:
    (step,) = load(dataset_path, 1)
    # Per pack: [begin, image, end, text, eos] + [text, eos] = 7 tokens; labels text, eos, eos = 3; 4 patches.
    assert (step.counts.tokens, step.counts.labels, step.counts.patches) == (4 * 7, 4 * 3, 4 * 4)
    assert step.wait_s >= 0
    assert step.imbalance == (1.0, 1.0)  # one rank


def test_a_missing_shard_is_an_error_in_the_consumer_that_names_it(dataset_path: Path) -> None:
    (dataset_path / "shards" / "train-00000.parquet").unlink()
    with pytest.raises(UserError, match=r"train-00000\.parquet: no such file"):
        load(dataset_path, 1)


def test_the_thread_stays_only_a_few_steps_ahead(dataset_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, original = [], Loader._load

    def counted(self: Loader, index: int) -> Any:
        loaded.append(index)
        return original(self, index)

    def settled() -> int:
        """Steps loaded when no more came for a quarter of a second."""
        count = -1
        while count < len(loaded) < 50:
            count = len(loaded)
            time.sleep(0.25)
        return len(loaded)

    monkeypatch.setattr(Loader, "_load", counted)
    loader = new_loader(dataset_path)
    try:
        # Two are ready, and a third is in the hand of the thread; with each one taken comes one more.
        assert settled() == STEPS_AHEAD + 1 == 3
        assert [step.index for step in itertools.islice(loader, 2)] == [0, 1]
        assert settled() == 5
    finally:
        loader.close()


def test_the_thread_works_on_the_device_of_its_rank_before_it_pins(
    dataset_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str]] = []

    def record(what: str) -> None:
        calls.append((what, threading.current_thread().name))

    def load_nothing(self: Loader, index: int) -> None:
        record("load")
        raise UserError("nothing to load")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: record(str(device)))
    monkeypatch.setattr(Loader, "_load", load_nothing)
    loader = new_loader(dataset_path, device="cuda:1")
    with pytest.raises(UserError, match="nothing to load"):
        next(iter(loader))
    loader.close()
    assert calls == [("cuda:1", "loader"), ("load", "loader")]


def test_closing_ends_the_thread_even_when_nobody_takes_its_steps(dataset_path: Path) -> None:
    loader = new_loader(dataset_path)
    loader.close()
    assert not loader._thread.is_alive()


# Codecs

PICTURES: list[list[Document]] = [
    [[Picture(2, 4, seed=n), 10 + n, Picture(2, 2, t=2, seed=n)], [Picture(4, 2, seed=30 + n), 20 + n]]
    for n in range(10)
]
WIDE = Budget(S=24, N=2, L=16)
ALONE: dict[str, Any] = {"dp_size": 1, "accumulation": 1, "packs_per_microbatch": 4}


def coded(directory: Path, codec: str) -> Path:
    return write_dataset(directory / codec, {"train": PICTURES}, WIDE, codec=codec)


def assert_same_steps(found: list[Step], expected: list[Step]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.index == other.index and one.counts.to_list() == other.counts.to_list()
        for a, b in zip(one.microbatches, other.microbatches, strict=True):
            for field in fields(Batch):
                assert torch.equal(getattr(a, field.name), getattr(b, field.name)), field.name


@pytest.mark.parametrize("threads", [1, 3])
def test_zstd_gives_the_steps_of_raw_bit_for_bit(tmp_path: Path, threads: int) -> None:
    raw = load(coded(tmp_path, "raw"), 6, accumulation=2)
    zstd = load(coded(tmp_path, "zstd"), 6, accumulation=2, decode_threads=threads)
    assert_same_steps(zstd, raw)
    assert raw[0].counts.patches == 4 * (8 + 8 + 8)


@pytest.mark.parametrize("codec", ["zstd", "jpeg"])
def test_threads_give_the_batches_that_decoding_in_place_gives(
    tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = coded(tmp_path, codec)
    monkeypatch.setattr(torch, "empty", dirty_empty)  # a place that nothing is decoded into shows
    steps = load(path, 5, decode_threads=3)
    dataset = open_dataset(path)
    for step in steps:
        numbers = single(dataset).packs_of_step("train", 4, 3, step.index)
        numbers = numbers[deal_packs(dataset.costs("train", numbers), **ALONE)[0, 0]]
        alone = assemble_batch(
            [dataset.pack("train", number) for number in numbers],
            [dataset.document_spans("train", number) for number in numbers],
            BatchShape(packs=4, budget=WIDE, geometry=dataset.geometry, pad_token=dataset.tokens.pad),
        )
        for field in fields(Batch):
            found = getattr(step.microbatches[0], field.name)
            assert torch.equal(found, getattr(alone, field.name)), field.name


def dirty_empty(shape: tuple[int, ...], dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
    return torch.full(shape, 77, dtype=dtype)


@pytest.mark.parametrize("codec", ["zstd", "jpeg"])
def test_a_damaged_frame_is_an_error_in_the_consumer_that_names_it(tmp_path: Path, codec: str) -> None:
    path = coded(tmp_path, codec)
    shard = path / "shards" / "train-00000.parquet"
    reader = open_dataset(path).locate("train", 7)[0]
    content = bytearray(shard.read_bytes())
    content[reader.byte_ranges(7)["patches"].stop - 3] ^= 0x20  # the end of the last of three images
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"train-00000\.parquet: pack 7: image 2 is damaged"):
        load(path, 3)  # 12 packs of 10: all are met


def test_only_a_data_set_with_frames_has_decoding_threads(tmp_path: Path) -> None:
    for codec, expected in (("raw", set()), ("zstd", {"decode_0", "decode_1"})):
        before = set(threading.enumerate())
        loader = new_loader(coded(tmp_path, codec))
        next(iter(loader))
        names = {thread.name for thread in set(threading.enumerate()) - before} - {"loader"}
        loader.close()
        assert names == expected
        assert set(threading.enumerate()) <= before, "closing ends them"
