"""Mixtures: how often samples are used, where their copies go, and what the account says of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preprocess.config import PlanConfig, PreprocessConfig
from preprocess.job import run_job
from preprocess.plan.mixture import chosen_rows, source_repeats
from preprocess.sources.base import SourceConfig
from preprocess.sources.webdataset import WebDatasetConfig
from preprocess.verify import verify_dataset
from shared.errors import UserError
from tests.preprocess.inputs import BUDGET, make_config, mixed_samples, write_samples
from tests.preprocess.planning import Segment, image, plan, text


def texts(count: int, tokens: int = 14) -> dict[str, list[Segment]]:
    """Samples of tokens + 2."""
    return {f"{n:04d}": [text(tokens)] for n in range(count)}


def test_a_repeat_uses_every_sample_so_often_and_a_fraction_of_them_once_more(tmp_path: Path) -> None:
    planned = plan(tmp_path, {"web": texts(1000)}, rules={"web": {"repeat": 2.3}}, window=500)
    uses = Counter(planned.uses().values())
    assert set(uses) == {2, 3} and uses.total() == 1000
    assert 256 <= uses[3] <= 344  # binomial: 300 +- 14.5
    assert planned.counts("web", "whole", "repeated") == (2000 + uses[3], 1000 + uses[3])
    assert planned.rejects == []


def test_a_repeated_document_that_is_cut_is_one_sample_in_every_use(tmp_path: Path) -> None:
    # bos + 198 + eos = 200 tokens: four parts.
    planned = plan(
        tmp_path, {"web": {"long": [text(198)], "short": [text(9)]}}, rules={"web": {"repeat": 3.0}}
    )
    kinds = ("whole", "split", "parts", "repeated")
    assert planned.counts("web", *kinds) == (3, 3, 12, 4)
    copies = Counter((p["key"], p["copy"]) for p in planned.pieces)
    assert copies == {(key, n): parts for key, parts in (("long", 4), ("short", 1)) for n in range(3)}


def test_no_pack_holds_two_copies_of_a_sample_and_copies_go_to_different_windows(tmp_path: Path) -> None:
    samples = {"web": texts(40), "few": texts(3)}
    rules = {"web": {"repeat": 1.5}, "few": {"repeat": 7.0}}
    # The samples of one window go to seven, so that every copy has its own; of eight windows, four would do.
    for window, num_windows in ((65_536, 7), (10, 9)):
        planned = plan(tmp_path / str(window), samples, rules=rules, window=window)
        assert planned.uses("few") == {"0000": 7, "0001": 7, "0002": 7}
        copies = Counter((p["source"], p["key"], p["window"]) for p in planned.pieces)
        assert set(copies.values()) == {1}
        assert len({p["window"] for p in planned.pieces}) == num_windows


def test_a_source_too_small_for_its_weight_is_refused_before_it_fills_a_pack_for_each_copy(
    tmp_path: Path,
) -> None:
    # 60 samples of 16 tokens, and one of equal weight: used 60 times it has a pack of 64 for every two copies.
    rules: dict[str, dict[str, Any]] = {"web": {"weight": 1.0}, "one": {"weight": 1.0}}
    with pytest.raises(UserError, match=r"'one' would be used 60 times.* about 30 packs.* at most 16 uses"):
        plan(tmp_path / "a", {"web": texts(60), "one": texts(1)}, rules=rules)
    # 3 samples: 20 times, one and a half packs for each copy; 4 samples: 15 times, two packs.
    with pytest.raises(UserError, match=r"'one' would be used 20 times"):
        plan(tmp_path / "b", {"web": texts(60), "one": texts(3)}, rules=rules)
    planned = plan(tmp_path / "c", {"web": texts(60), "one": texts(4)}, rules=rules)
    assert set(planned.uses("one").values()) == {15} and len(planned.packs()) <= 40


def test_more_copies_than_packs_of_text_are_taken_where_pictures_fill_the_packs(tmp_path: Path) -> None:
    # Of 12 tokens and 32 patches five fit by tokens, two by patches: 4 * 17 fill 13 or 34 packs, two for each copy.
    planned = plan(
        tmp_path, {"web": {f"{n}": [image(4, 8)] for n in range(4)}}, rules={"web": {"repeat": 17.0}}
    )
    assert set(planned.uses().values()) == {17} and len(planned.packs()) == 34


def test_what_a_repeat_below_one_leaves_out_is_counted_and_named(tmp_path: Path) -> None:
    planned = plan(tmp_path, {"web": texts(1000)}, rules={"web": {"repeat": 0.3}})
    used = planned.uses()
    left_out = {reject["key"] for reject in planned.rejects}
    assert set(used.values()) == {1} and 256 <= len(used) <= 344
    assert set(used) | left_out == set(texts(1000)) and len(used) + len(left_out) == 1000
    assert planned.rejects[0] | {"key": ""} == {
        "source": "web",
        "key": "",
        "part": -1,
        "media": -1,
        "reason": "left_out_by_mixture",
        "detail": "repeat 0.3",
    }
    assert planned.summary["sources"]["web"]["rejected"] == {"left_out_by_mixture": len(left_out)}


def test_the_choice_of_a_fraction_depends_on_seed_source_and_row(tmp_path: Path) -> None:
    def used(name: str, source: str, seed: int) -> set[str]:
        samples = {source: texts(400)}
        return set(plan(tmp_path / name, samples, seed=seed, rules={source: {"repeat": 0.5}}).uses(source))

    first = used("a", "web", 0)
    assert first == used("b", "web", 0)
    for other in (used("c", "web", 1), used("d", "chat", 0)):
        assert 70 <= len(first & other) <= 130  # independent halves share a quarter: 100 +- 8.7
    # Within a source, files of equal keys do not choose alike.
    rows = np.arange(400)
    one, two = (chosen_rows(0.5, 0, 0, place, rows) for place in ("web/0.parquet", "web/1.parquet"))
    assert 160 <= int((one == two).sum()) <= 240  # 200 +- 10


def test_weights_become_repeats_that_use_the_least_repeated_source_once() -> None:
    sources = {
        name: SourceConfig(paths=("x",), weight=weight)
        for name, weight in (("a", 3.0), ("b", 1.0), ("c", 0.0))
    }
    # a: 3 / 600 = 0.005 per token, b: 1 / 1000 = 0.001. c has no weight and is used as it is.
    tokens = {"a": 600, "b": 1000, "c": 5}
    assert source_repeats(sources, tokens, 1.0) == pytest.approx({"a": 5.0, "b": 1.0, "c": 1.0})
    assert source_repeats(sources, tokens, 0.2) == pytest.approx({"a": 1.0, "b": 0.2, "c": 1.0})
    with pytest.raises(UserError, match=r"source 'b' has weight 1\.0 but nothing to train on"):
        source_repeats(sources, {**tokens, "b": 0}, 1.0)


def test_a_mixture_has_the_shares_of_tokens_asked_for(tmp_path: Path) -> None:
    # 16 tokens per sample of web and 48 per sample of chat: 16,000 and 9,600 tokens, asked for 1 : 3.
    samples = {"web": texts(1000), "chat": texts(200, 46)}
    rules = {"web": {"weight": 1}, "chat": {"weight": 3}}
    planned = plan(tmp_path, samples, rules=rules, window=400)
    got = planned.summary["mixture"]
    assert got["web"] | {"share": 0} == {
        "weight": 1,
        "repeat": 1.0,
        "tokens_once": 16_000,
        "tokens": 16_000,
        "share_asked": 0.25,
        "share": 0,
    }
    assert got["chat"]["repeat"] == 5.0 and got["chat"]["tokens"] == 48_000 and got["chat"]["share"] == 0.75
    assert set(planned.uses("chat").values()) == {5} and set(planned.uses("web").values()) == {1}


def test_the_weights_count_neither_validation_nor_what_is_rejected(tmp_path: Path) -> None:
    samples = {"web": texts(400), "chat": {**texts(200), **{f"long{n}": [text(80)] for n in range(50)}}}
    planned = plan(
        tmp_path,
        samples,
        rules={"web": {"weight": 1}, "chat": {"weight": 1}},
        too_long="reject",
        validation_fraction=0.2,
    )
    got = planned.summary["mixture"]
    for name in samples:
        train = {p["key"] for p in planned.pieces if p["source"] == name and p["split"] == "train"}
        assert got[name]["tokens_once"] == 16 * len(train)
        assert abs(got[name]["share"] - 0.5) < 0.03  # 5 standard deviations of some 160 fractions
    assert planned.summary["sources"]["chat"]["rejected"] == {"exceeds_S": 50}


def test_validation_samples_are_used_once_whatever_the_mixture(tmp_path: Path) -> None:
    options: dict[str, Any] = {"validation_fraction": 0.3}
    plain = plan(tmp_path / "a", {"web": texts(200)}, **options)
    once = {p["key"] for p in plain.pieces if p["split"] == "validation"}
    for repeat in (0.2, 3.0):
        planned = plan(
            tmp_path / str(repeat), {"web": texts(200)}, rules={"web": {"repeat": repeat}}, **options
        )
        found = [p["key"] for p in planned.pieces if p["split"] == "validation"]
        assert len(found) == len(once) and set(found) == once


def test_every_window_has_of_every_source_what_the_source_has_of_all(tmp_path: Path) -> None:
    # 2000, 500 and 60 pieces in 10 windows of 256.
    sizes = {"large": 2000, "middle": 500, "small": 60}
    planned = plan(tmp_path, {name: texts(count) for name, count in sizes.items()}, window=256)
    windows: dict[str, Counter[str]] = {}
    for piece in planned.pieces:
        windows.setdefault(piece["window"], Counter())[piece["source"]] += 1
    assert len(windows) == 10
    for counts in windows.values():
        # Slices of at most 256 / 16 = 16 rows, a border of the window on either side.
        assert all(abs(counts[name] - size / 10) <= 2 * 16 for name, size in sizes.items()), counts
        assert abs(counts.total() - 256) <= 16
    # The small source is in four windows or more of its four slices, not all in the first or the last ones.
    assert sum(counts["small"] > 0 for counts in windows.values()) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repeat": 0.0}, "repeat must be above 0"),
        ({"weight": -1.0}, "weight not below, got 1.0 and -1.0"),
        ({"repeat": 2.0, "weight": 1.0}, "two answers to one question"),
    ],
)
def test_a_mixture_that_means_nothing_is_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourceConfig(paths=("x",), **settings)


def test_least_repeat_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="least_repeat is set, but no source has a weight"):
        make_config(tmp_path, tmp_path, plan=PlanConfig(least_repeat=0.5))


def mixture_config(directory: Path, **plan_options: Any) -> PreprocessConfig:
    sources: dict[str, Any] = {}
    for name, count, seed, rule in (("one", 60, 0, {"repeat": 0.5}), ("two", 25, 1, {"repeat": 2.4})):
        tar = write_samples(directory / f"{name}.tar", mixed_samples(count, seed, prefix=name))
        sources[name] = WebDatasetConfig(paths=(str(tar),), max_reject_rate=0.01, **rule)
    options = {"shard_bytes": 8192, "window": 30, "validation_fraction": 0.1, **plan_options}
    return make_config(directory, directory, sources=sources, plan=PlanConfig(**options), budget=BUDGET)


def test_a_job_with_a_mixture_balances_and_its_data_set_is_without_fault(tmp_path: Path) -> None:
    config = mixture_config(tmp_path)
    stats = run_job(config)  # what is left out deliberately is above max_reject_rate, and no loss
    one, two = stats["account"]["one"], stats["account"]["two"]
    assert one["read"] == 60 and one["repeated"] == 0 and set(one["rejected"]) == {"left_out_by_mixture"}
    assert one["packed"] == 60 - one["rejected"]["left_out_by_mixture"]
    assert two["read"] == 25 and two["rejected"] == {} and two["packed"] == 25 + two["repeated"] > 45
    counts, faults = verify_dataset(Path(config.output))
    assert faults == [] and counts["documents"] == one["packed"] + two["packed"]
    tokens = sum(line["tokens"] for line in stats["mixture"].values())
    assert tokens == stats["splits"]["train"]["tokens"]
