"""Duplicates: which are found, which stays, and how they are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preprocess.plan import duplicates
from tests.preprocess.planning import Planned, Segment, plan, text

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
