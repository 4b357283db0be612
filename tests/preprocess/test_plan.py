"""The plan: which piece goes where, recomputed from the plan files alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preprocess.samples import IMAGE, TEXT, IndexSegment
from preprocess.stream import split_sample
from shared.geometry import Budget
from tests.preprocess.inputs import BUDGET, GEOMETRY
from tests.preprocess.planning import IDS, Planned, Segment, captioned, image, patches_of, plan, run, text


def test_every_sample_is_in_one_pack_and_no_budget_is_broken(tmp_path: Path) -> None:
    samples = captioned(300)
    planned = plan(tmp_path, {"web": samples}, shard_bytes=20_000)
    assert sorted(piece["key"] for piece in planned.pieces) == sorted(samples)
    for pack in planned.packs().values():
        rows: Counter[int] = Counter()
        for piece in pack:
            assert len(piece["rows"]) == len(patches_of(piece))
            for row, patches in zip(piece["rows"], patches_of(piece), strict=True):
                rows[row] += patches
        assert sum(piece["end"] - piece["start"] for piece in pack) <= BUDGET.S
        assert max(rows.values()) <= BUDGET.L and set(rows) <= set(range(BUDGET.N))


def test_a_plan_file_holds_the_segments_as_the_index_has_them(tmp_path: Path) -> None:
    (piece,) = plan(tmp_path, {"web": {"k": [image(2, 4), text(9)]}}).pieces
    assert IndexSegment(**piece["segments"][0]) == IndexSegment(IMAGE, "x.tar", 0, 100, 4, 8, 9, 1, 2, 4)
    assert piece["segments"][1]["tokens"] == 9 and piece["segments"][1]["kind"] == TEXT
    # bos + 4 + 9 + eos
    assert (piece["source"], piece["unit"], piece["key"]) == ("web", "web.tar", "k")
    assert (piece["part"], piece["parts"], piece["start"], piece["end"]) == (0, 1, 0, 15)


def test_the_same_seed_gives_the_same_files_and_another_seed_other_packs(tmp_path: Path) -> None:
    samples = {"web": captioned(200)}
    first, again, other = (
        plan(tmp_path / name, samples, seed=seed, shard_bytes=20_000, window=40)
        for name, seed in (("a", 7), ("b", 7), ("c", 8))
    )
    assert first.files == again.files and first.summary == again.summary
    # Pairs may meet again by chance.
    assert len(first.members() & other.members()) < 0.1 * len(first.members())


def test_packs_are_not_ordered_by_length(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    samples = {f"{n}": [text(int(rng.integers(1, 63)))] for n in range(2000)}
    packs = plan(tmp_path, {"web": samples}).packs()
    longest = [max(piece["end"] - piece["start"] for piece in pack) for pack in packs.values()]
    assert len(longest) > 900
    # Best fit decreasing opens packs from long to short, a correlation near -1; of 900 shuffled ones, 0 +- 0.033.
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.15


def test_pieces_of_one_window_are_packed_together_and_not_with_others(tmp_path: Path) -> None:
    samples = {f"{n}": [text(1)] for n in range(20)}  # 3 tokens each: all 20 would fit one pack of 64
    by_window = {
        window: plan(tmp_path / str(window), {"web": samples}, window=window) for window in (1, 4, 100)
    }
    sizes = {w: Counter(len(pack) for pack in planned.packs().values()) for w, planned in by_window.items()}
    assert sizes == {1: Counter({1: 20}), 4: Counter({4: 5}), 100: Counter({20: 1})}
    # Windows are shuffled over the whole input: neighbours of the input are not neighbours in a pack.
    assert frozenset("0 1 2 3".split()) not in by_window[4].members()


def test_the_validation_split_depends_on_keys_alone(tmp_path: Path) -> None:
    web = captioned(400)
    more = {f"x{key}": sample for key, sample in captioned(300, seed=5).items()}
    alone = plan(tmp_path / "a", {"web": web}, validation_fraction=0.2)
    mixed = plan(tmp_path / "b", {"more": more, "web": web}, validation_fraction=0.2, seed=3, window=50)
    larger = plan(tmp_path / "c", {"web": web}, validation_fraction=0.4)

    def chosen(planned: Planned) -> set[str]:
        return {p["key"] for p in planned.pieces if p["split"] == "validation" and p["source"] == "web"}

    assert chosen(alone) == chosen(mixed)
    assert chosen(alone) < chosen(larger)
    assert 50 <= len(chosen(alone)) <= 110  # binomial: 80 +- 8
    assert {p["key"] for p in alone.pieces if p["split"] == "train"} == set(web) - chosen(alone)
    names = {shard.name.partition("-")[0] for shard in alone.shards}
    assert names == {"train", "validation"}


def test_no_validation_is_planned_unless_it_is_asked_for(tmp_path: Path) -> None:
    planned = plan(tmp_path, {"web": captioned(100)})
    assert {shard.split for shard in planned.shards} == {"train"}


def test_a_sample_longer_than_a_pack_has_all_its_parts_in_the_plan_and_in_one_split(
    tmp_path: Path,
) -> None:
    # bos + 198 + eos = 200 tokens in parts of 50: ceil(200 / 64) = 4.
    long = {f"long{n}": [text(198)] for n in range(30)}
    planned = plan(tmp_path, {"web": {**long, **captioned(20)}}, validation_fraction=0.3)
    for key in long:
        parts = sorted((p for p in planned.pieces if p["key"] == key), key=lambda p: p["part"])
        assert [(p["part"], p["parts"], p["start"], p["end"]) for p in parts] == [
            (0, 4, 0, 50),
            (1, 4, 50, 100),
            (2, 4, 100, 150),
            (3, 4, 150, 200),
        ]
        assert len({p["split"] for p in parts}) == 1
    assert planned.counts() == (20, 30, 120)
    assert planned.rejects == []


def test_images_that_need_too_many_rows_are_cut_by_images(tmp_path: Path) -> None:
    # Five of 32 patches fill a row each; N = 2 rows in a part. Begin, end and 8 tokens for each: 10.
    (first, second, third) = plan(tmp_path, {"web": {"k": [image(4, 8)] * 5}}).pieces
    parts = sorted((p["part"], p["first_image"], len(p["rows"])) for p in (first, second, third))
    assert parts == [(0, 0, 2), (1, 2, 1), (2, 3, 2)]  # the middle of the third lies in the middle


def test_images_that_fit_only_in_document_order_are_packed(tmp_path: Path) -> None:
    grids = [(4, 5), (2, 6), (2, 4), (4, 4), (2, 6), (2, 6)]  # 20 12 8 | 16 12 12 fill two rows of 40
    planned = plan(tmp_path, {"web": {"k": [image(*grid) for grid in grids]}}, Budget(S=64, N=2, L=40))
    (piece,) = planned.pieces
    assert piece["rows"] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("segments", "reason", "detail"),
    [
        ([text(63)], "exceeds_S", "65 tokens, 0 images"),
        ([image(4, 8)] * 3, "exceeds_N", "32 tokens, 3 images"),
        ([image(4, 8)] * 7, "exceeds_S", "72 tokens, 7 images"),
        ([image(6, 6), text(1)], "exceeds_L", "14 tokens, 1 images"),  # 36 patches
    ],
)
def test_what_may_not_be_cut_is_rejected_by_the_name_of_the_budget(
    tmp_path: Path, segments: list[Segment], reason: str, detail: str
) -> None:
    planned = plan(tmp_path, {"chat": {"k": segments, "good": [text(3)]}}, too_long="reject")
    assert [p["key"] for p in planned.pieces] == ["good"]
    expected = {"source": "chat", "key": "k", "part": -1, "media": -1, "reason": reason, "detail": detail}
    assert planned.rejects == [expected]
    assert planned.counts("chat") == (1, 0, 0) and planned.summary["sources"]["chat"]["rejected"] == {
        reason: 1
    }


def test_a_block_of_nothing_but_rejects_is_told_sample_by_sample(tmp_path: Path) -> None:
    # 1100 samples: two blocks, one in which all are too long, in both splits.
    samples = {f"{n:04d}": [text(80 if n < 1024 else 8)] for n in range(1100)}
    planned = plan(tmp_path, {"chat": samples}, too_long="reject", validation_fraction=0.3, window=400)
    assert {reject["key"] for reject in planned.rejects} == {key for key in samples if key < "1024"}
    assert len(planned.rejects) == 1024 and planned.summary["sources"]["chat"]["rejected"] == {
        "exceeds_S": 1024
    }
    assert planned.counts("chat") == (76, 0, 0)
    assert planned.summary["mixture"]["chat"]["tokens_once"] == 10 * sum(
        piece["split"] == "train" for piece in planned.pieces
    )


@pytest.mark.parametrize(
    ("segments", "budget", "reason"),
    [
        ([image(6, 6), text(1)], BUDGET, "exceeds_L"),
        ([text(50), image(4, 8)], Budget(S=9, N=2, L=32), "exceeds_S"),  # one image of 10 tokens
    ],
)
def test_what_cannot_be_cut_is_rejected_even_where_cutting_is_allowed(
    tmp_path: Path, segments: list[Segment], budget: Budget, reason: str
) -> None:
    planned = plan(tmp_path, {"web": {"k": segments}}, budget)
    assert planned.pieces == [] and planned.shards == []
    assert [reject["reason"] for reject in planned.rejects] == [reason]


def test_samples_rejected_by_the_scan_are_not_planned(tmp_path: Path) -> None:
    samples = {"a": "image_empty", "b": [text(3)], "c": "no_caption"}
    planned = plan(tmp_path, {"web": samples, "none": {}})
    assert [p["key"] for p in planned.pieces] == ["b"]
    assert planned.counts() == (1, 0, 0) and planned.counts("none") == (0, 0, 0)
    assert planned.rejects == []  # they are told by the scan


def payload(planned: Planned) -> dict[str, int]:
    """Bytes of tokens, labels, positions and patches of each shard."""
    bytes_of: Counter[str] = Counter()
    for (name, _), pack in planned.packs().items():
        patches = sum(sum(patches_of(piece)) for piece in pack)
        bytes_of[name] += 12 * BUDGET.S + patches * GEOMETRY.values_per_patch
    return dict(bytes_of)


def test_shards_are_cut_to_the_bytes_asked_for_within_one_pack(tmp_path: Path) -> None:
    planned = plan(tmp_path, {"web": captioned(400)}, shard_bytes=30_000)
    sizes = payload(planned)
    assert len(sizes) == round(sum(sizes.values()) / 30_000) > 5
    largest_pack = 12 * BUDGET.S + BUDGET.N * BUDGET.L * GEOMETRY.values_per_patch
    assert max(sizes.values()) - min(sizes.values()) <= largest_pack
    names = [shard.name for shard in planned.shards]
    assert names == [f"train-000000-{number:03d}.parquet" for number in range(len(names))]
    for shard in planned.shards:
        packs = [key for key in planned.packs() if key[0] == shard.name]
        assert [number for _, number in packs] == list(range(shard.packs))  # sorted, none empty


def test_a_shard_holds_at_least_one_pack_and_a_large_limit_gives_one_shard(tmp_path: Path) -> None:
    small = plan(tmp_path / "a", {"web": captioned(50)}, shard_bytes=1)
    assert all(shard.packs == 1 for shard in small.shards)
    large = plan(tmp_path / "b", {"web": captioned(50)}, shard_bytes=1 << 40)
    assert len(large.shards) == 1
    assert small.members() == large.members()


def test_a_hundred_petabytes_are_cut_into_shards_like_a_hundred_kilobytes(tmp_path: Path) -> None:
    # 3000 packs of 2^40 patches of 48 bytes, 1.6e17 bytes, 10 in a shard: 300 times that is beyond int64.
    samples = {f"{n}": [(10, 1 << 20, 1 << 20)] for n in range(3000)}
    planned = plan(tmp_path, {"web": samples}, Budget(S=64, N=1, L=1 << 40), shard_bytes=480 << 40)
    assert [shard.packs for shard in planned.shards] == [10] * 300


def long_and_short(count: int) -> dict[str, list[Segment]]:
    """Every tenth is cut into four parts."""
    return {f"{n:05d}": [text(198 if n % 10 == 0 else 10 + n % 40)] for n in range(count)}


def test_any_number_of_workers_and_any_interruption_give_the_same_files(tmp_path: Path) -> None:
    samples = {"web": long_and_short(150), "chat": captioned(90)}
    options: dict[str, Any] = {"window": 30, "shard_bytes": 9_000, "validation_fraction": 0.2}
    options |= {"duplicates": "drop", "content": dict.fromkeys(("00003", "00004", "0005"), 7)}
    options |= {"rules": {"chat": {"repeat": 0.7}}}
    whole = plan(tmp_path / "a", samples, **options)
    assert len({shard.plan for shard in whole.shards}) == 9

    def in_two_processes(function: Any, tasks: Sequence[Any], **_: Any) -> list[Any]:
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            return [done.result() for done in as_completed([pool.submit(function, t) for t in tasks])]

    ended: list[str] = []

    def until_the_fourth_window(function: Any, tasks: Sequence[Any], *, label: str, total: int) -> list[Any]:
        if label == "plan":
            run(function, tasks[:3], label=label, total=total)
            raise KeyboardInterrupt
        return run(function, tasks, label=label, total=total)

    def told(function: Any, tasks: Sequence[Any], *, label: str, total: int) -> list[Any]:
        ended.extend(str(task) for task in tasks if label == "plan")
        return run(function, tasks, label=label, total=total)

    assert plan(tmp_path / "b", samples, run=in_two_processes, **options).files == whole.files
    with pytest.raises(KeyboardInterrupt):
        plan(tmp_path / "c", samples, run=until_the_fourth_window, **options)
    again = plan(tmp_path / "c", samples, run=told, **options)
    assert again.files == whole.files
    assert ended == [f"train-{n:06d}" for n in range(3, 7)] + ["validation-000000", "validation-000001"]


def test_the_windows_of_a_split_are_equally_full(tmp_path: Path) -> None:
    # 101 pieces in windows of at most 30: four, not three full ones and a rest of 11.
    planned = plan(tmp_path / "a", {"web": captioned(101)}, window=30)
    pieces = Counter(piece["window"] for piece in planned.pieces)
    assert sorted(pieces.values()) == [25, 25, 25, 26]
    # 1800 samples, and 200 that are cut into 4 parts: 2600 pieces, 10 windows.
    planned = plan(tmp_path / "b", {"web": long_and_short(2000)}, window=261)
    pieces = Counter(piece["window"] for piece in planned.pieces)
    assert len(pieces) == 10 and min(pieces.values()) > 220 and max(pieces.values()) < 300


def test_a_validation_split_of_few_samples_is_packed_together(tmp_path: Path) -> None:
    samples = {f"web/{n}": {f"{n}-{key}": s for key, s in long_and_short(300).items()} for n in range(4)}
    planned = plan(tmp_path, samples, window=100, validation_fraction=0.02)
    packs = [pack for pack in planned.packs().values() if pack[0]["split"] == "validation"]
    used = sum(piece["end"] - piece["start"] for pack in packs for piece in pack)
    # 24 +- 5 samples out of four files and 16 windows of training samples.
    assert len({piece["window"] for piece in planned.pieces}) == 17 and 12 <= sum(map(len, packs)) <= 60
    assert used / (len(packs) * BUDGET.S) > 0.75


def test_every_piece_carries_its_own_segments_and_pictures(tmp_path: Path) -> None:
    # Keys tell the tokens of their text: cut ones lie between whole ones in the files.
    lengths = {f"{n:03d}": 150 + n if n % 7 == 0 else 1 + n % 50 for n in range(200)}
    samples = {key: [image(2, 4), text(count)] for key, count in lengths.items()}
    planned = plan(tmp_path, {"web": samples}, window=70)
    texts: Counter[str] = Counter()
    for piece in planned.pieces:
        images, own = patches_of(piece), [s["tokens"] for s in piece["segments"] if s["kind"] == TEXT]
        assert images == ([8] if piece["part"] == 0 else []) and len(piece["rows"]) == len(images)
        assert piece["length"] == 1 + 4 + lengths[piece["key"]] + 1
        # A text token behind the end comes along as the last label.
        following = int(0 < piece["end"] < piece["length"] - 1)
        texts[piece["key"]] += sum(own) - following
    assert texts == lengths


@pytest.mark.parametrize("images_per_row", [0, 2])
def test_samples_taken_as_whole_without_placing_their_images_are_those_that_fit(
    tmp_path: Path, images_per_row: int
) -> None:
    rng = np.random.default_rng(1)
    budget = Budget(S=64, N=2, L=40)
    samples: dict[str, list[Segment]] = {}
    for n in range(400):
        sides = 2 * rng.integers(1, 4, (int(rng.integers(0, 9)), 2))
        samples[f"{n}"] = [text(int(rng.integers(1, 20))), *(image(int(h), int(w)) for h, w in sides)]
    planned = plan(tmp_path, {"web": samples}, budget, images_per_row=images_per_row)
    parts = {piece["key"]: piece["parts"] for piece in planned.pieces}
    for key, sample in samples.items():
        segments = [
            IndexSegment(IMAGE, "", 0, 0, h * w // 4 + 2, 1, 1, 1, h, w)
            if h
            else IndexSegment(TEXT, "", 0, 0, count)
            for count, h, w in sample
        ]
        expected = split_sample(segments, IDS, budget, images_per_row)
        assert parts[key] == len(expected), sample
    assert 50 < sum(count > 1 for count in parts.values()) < 350
