"""Duplicates: which are found, which stays, and how they are told."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preprocess.plan import duplicates
from shared.files import read_part
from tests.preprocess.planning import Planned, Segment, plan, run, text

# Files in the order of the config: web/0, web/1, chat/0.
SAMPLES: dict[str, dict[str, list[Segment]]] = {
    "web/0": {"a": [text(5)], "b": [text(6)], "c": [text(5)]},
    "web/1": {"d": [text(5)], "e": [text(7)]},
    "chat/0": {"f": [text(7)], "g": [text(8)], "h": [text(5)]},
}
CONTENT = {"a": 1 << 63, "b": 20, "c": 1 << 63, "d": 1 << 63, "e": 7, "f": 7, "g": 21, "h": 1 << 63}


def keys(planned: Planned) -> set[str]:
    return {piece["key"] for piece in planned.pieces}


def test_duplicates_are_counted_and_kept_unless_the_config_says_otherwise(tmp_path: Path) -> None:
    planned = plan(tmp_path, SAMPLES, content=CONTENT)
    assert planned.summary["duplicates"] == {
        "web": {"found": 2, "dropped": 0, "across_splits": 0},
        "chat": {"found": 2, "dropped": 0, "across_splits": 0},
    }
    assert keys(planned) == set("abcdefgh") and planned.rejects == []
    assert plan(tmp_path / "x", SAMPLES, content=CONTENT, duplicates="ignore").summary["duplicates"] is None


@pytest.mark.parametrize("per_range", [1, 3, 1 << 24])
def test_the_first_in_the_order_of_sources_files_and_rows_stays(
    tmp_path: Path, per_range: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "HASHES_PER_RANGE", per_range)  # 8, 3 and 1 ranges
    planned = plan(tmp_path, SAMPLES, content=CONTENT, duplicates="drop")
    assert keys(planned) == set("abeg")
    found = sorted((r["source"], r["key"], r["reason"], r["detail"]) for r in planned.rejects)
    assert found == [
        ("chat", "f", "duplicate", "same content as web e"),
        ("chat", "h", "duplicate", "same content as web a"),
        ("web", "c", "duplicate", "same content as web a"),
        ("web", "d", "duplicate", "same content as web a"),
    ]
    assert planned.summary["sources"]["web"]["rejected"] == {"duplicate": 2}
    assert planned.counts("web") == (3, 0, 0) and planned.counts("chat") == (1, 0, 0)


def test_a_duplicate_across_the_splits_is_counted_and_dropped_on_whichever_side_it_is(tmp_path: Path) -> None:
    # Two files of the same contents under other keys: about half of the pairs lie across.
    samples = {f"web/{n}": {f"{n}-{row}": [text(3)] for row in range(200)} for n in range(2)}
    content = {key: 1 + int(key.partition("-")[2]) for own in samples.values() for key in own}
    planned = plan(tmp_path, samples, content=content, validation_fraction=0.5, duplicates="drop")
    plain = plan(tmp_path / "x", samples, content=content, validation_fraction=0.5)
    split = {piece["key"]: piece["split"] for piece in plain.pieces}
    across = sum(split[f"0-{row}"] != split[f"1-{row}"] for row in range(200))
    assert planned.summary["duplicates"]["web"] == {"found": 200, "dropped": 200, "across_splits": across}
    assert {piece["key"]: piece["split"] for piece in planned.pieces} == {
        key: where for key, where in split.items() if key.startswith("0-")
    }


def test_the_ranges_together_read_every_hash_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "HASHES_PER_RANGE", 100)  # 10 ranges
    rng = np.random.default_rng(0)
    samples: dict[str, Any] = {f"web/{n}": {f"{n}-{row}": [text(2)] for row in range(500)} for n in range(2)}
    content = {key: int(rng.integers(1, 1 << 63)) << 1 for own in samples.values() for key in own}
    read: list[int] = []

    def counted(path: Path, start: int, end: int) -> bytes:
        part = read_part(path, start, end)
        read.append(len(part))
        return part

    monkeypatch.setattr(duplicates, "read_part", counted)
    plan(tmp_path, samples, content=content)
    # 8 bytes of hash and 4 of row for each of 1000; 10 times, of 2 files, where each of the 10 ranges begins and ends.
    assert sum(read) == 1000 * 12 + 10 * 2 * 8 * 11


def test_a_task_of_a_range_is_small_however_many_files_there_are(tmp_path: Path) -> None:
    samples = {f"web/{n}": {f"{n}": [text(2)]} for n in range(150)}  # some 80 bytes each, were they in a task
    sizes: list[int] = []

    def measured(function: Any, tasks: Sequence[Any], *, label: str, total: int) -> list[Any]:
        if label == "duplicates":
            sizes.extend(len(pickle.dumps(task)) for task in tasks)
        return run(function, tasks, label=label, total=total)

    planned = plan(tmp_path, samples, content=dict.fromkeys(map(str, range(150)), 5), run=measured)
    assert planned.summary["duplicates"]["web"]["found"] == 149
    assert len(sizes) == 1 and sizes[0] < 8_000


def test_a_sample_that_is_too_long_takes_no_other_one_with_it(tmp_path: Path) -> None:
    # The same content, rejected in the first source; in the second it is cut. `later` is the second that is used.
    long = [text(80)]
    samples = {"chat": {"long": long}, "web": {"cut": long, "later": long}, "last": {"also": long}}
    rules = {"chat": {"too_long": "reject"}, "last": {"too_long": "reject"}}
    content = dict.fromkeys(("long", "cut", "later", "also"), 9)
    planned = plan(tmp_path, samples, content=content, duplicates="drop", too_long="split", rules=rules)
    assert keys(planned) == {"cut"}
    found = sorted((r["key"], r["reason"], r["detail"]) for r in planned.rejects)
    assert found == [(key, "duplicate", "same content as web cut") for key in ("also", "later", "long")]
    # Where none is used the first stays, to be rejected by its own reason.
    none = plan(
        tmp_path / "x",
        {"chat": {"long": long}, "last": {"also": long}},
        content=content,
        duplicates="drop",
        rules=rules,
    )
    assert sorted((r["key"], r["reason"]) for r in none.rejects) == [
        ("also", "duplicate"),
        ("long", "exceeds_S"),
    ]


def test_what_the_mixture_leaves_out_takes_no_duplicate_with_it(tmp_path: Path) -> None:
    # Twice the same 300 contents: a tenth of the first source is used, and all of the second.
    samples = {name: {f"{name}{n}": [text(4)] for n in range(300)} for name in ("few", "all")}
    content = {f"{name}{n}": n + 1 for name in samples for n in range(300)}
    planned = plan(
        tmp_path, samples, content=content, duplicates="drop", rules={"few": {"repeat": 0.1}, "all": {}}
    )
    assert Counter(content[piece["key"]] for piece in planned.pieces) == dict.fromkeys(range(1, 301), 1)
    assert 10 <= planned.uses("few").total() <= 50  # binomial: 30 +- 5.2
    assert {reject["reason"] for reject in planned.rejects} == {"duplicate"} and len(planned.rejects) == 300


def test_a_sample_that_a_weight_may_leave_out_stays_before_one_that_is_surely_unused(tmp_path: Path) -> None:
    # With a least repeat of 0.01 next to nothing of `web` is sure; yet it stays, as `chat` would be rejected.
    samples = {
        "chat": {f"chat{n}": [text(80)] for n in range(50)},
        "web": {f"web{n}": [text(4)] for n in range(50)},
    }
    content = {f"{name}{n}": n + 1 for name in samples for n in range(50)}
    rules: dict[str, Any] = {"chat": {"too_long": "reject"}, "web": {"weight": 1.0}}
    planned = plan(tmp_path, samples, content=content, duplicates="drop", least_repeat=0.01, rules=rules)
    assert Counter(r["reason"] for r in planned.rejects if r["source"] == "chat") == {"duplicate": 50}
    assert planned.summary["duplicates"] == {"chat": {"found": 50, "dropped": 50, "across_splits": 0}}


def test_duplicates_among_many_rows_are_those_that_a_dictionary_finds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    samples: dict[str, Any] = {
        f"s{n % 3}/{n}": {f"{n}-{row}": [text(2)] for row in range(1500)} for n in (0, 3, 1, 4, 2)
    }
    content = {key: int(rng.integers(1, 4000)) << 51 for own in samples.values() for key in own}
    planned = plan(tmp_path, samples, content=content, duplicates="drop", window=2000)
    first: dict[int, str] = {}
    for own in samples.values():
        for key in own:
            first.setdefault(content[key], key)
    assert keys(planned) == set(first.values())
    named = {reject["key"]: reject["detail"].split()[-1] for reject in planned.rejects}
    assert named == {key: first[content[key]] for key in content if first[content[key]] != key}
