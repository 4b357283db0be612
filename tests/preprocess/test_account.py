"""The account, settled by hand."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from preprocess import account
from preprocess.account import ScanCounts, SourceAccount, scan_counts, settle
from preprocess.index import IndexedUnit, ScannedSample, open_index, read_counts
from preprocess.plan import driver
from preprocess.samples import IMAGE, TEXT, IndexSegment, Reject


def scanned(read: int, **rejected: int) -> ScanCounts:
    return ScanCounts(read=read, media=read, rejected=Counter(rejected))


def planned(whole: int, split: int = 0, parts: int = 0, repeated: int = 0, **rejected: int) -> dict[str, Any]:
    """One source of `sources` in plan.json, each piece with one picture."""
    counts = {"whole": whole, "split": split, "parts": parts, "repeated": repeated, "media": whole + parts}
    return {**counts, "rejected": rejected}


def failure(
    key: str, part: int, parts: int, reason: str = "image_corrupt", unit: str = "u", **changes: int
) -> dict[str, Any]:
    """One line of `rejects` in a shard's result file."""
    return {
        "source": "web",
        "key": key,
        "reason": reason,
        "detail": "",
        "part": part if parts > 1 else -1,
        "media": -1,
        "unit": unit,
        "row": ord(key),
        "copy": 0,
        "parts": parts,
        **changes,
    }


def result(whole: int, parts: int, *rejects: dict[str, Any]) -> dict[str, Any]:
    return {"packed": {"web": {"whole": whole, "parts": parts}}, "rejects": list(rejects)}


def test_rejects_of_scan_plan_and_pack_and_two_sources_balance_to_the_unit() -> None:
    results = [result(3, 0, failure("d", -1, 1)), result(2, 0)]
    plan = {"web": planned(6, exceeds_L=1), "chat": planned(0)}
    scan = {"web": scanned(8, no_image=1), "chat": scanned(1, no_image=1)}
    accounts = settle(["web", "chat"], scan, plan, results)
    assert accounts["web"].as_dict() == {
        "read": 8,
        "repeated": 0,
        "packed": 5,
        "split_parts": 0,
        "rejected": {"exceeds_L": 1, "image_corrupt": 1, "no_image": 1},
        "parts": {"made": 0, "packed": 0, "rejected": {}, "incomplete_samples": {}},
        "media_dropped": {},
    }
    assert accounts["chat"].as_dict()["rejected"] == {"no_image": 1}
    assert [account.imbalance() for account in accounts.values()] == [None, None]


def test_a_cut_sample_counts_as_split_until_its_last_part_fails() -> None:
    # s: one of three parts fails. t: both fail, in different shards, for different reasons.
    results = [
        result(1, 1, failure("s", 1, 3), failure("t", 0, 2)),
        result(0, 1, failure("t", 1, 2, "image_unreadable")),
    ]
    account = settle(["web"], {"web": scanned(3)}, {"web": planned(1, 2, 5)}, results)["web"]
    assert account.as_dict() == {
        "read": 3,
        "repeated": 0,
        "packed": 1,
        "split_parts": 1,
        "rejected": {"image_corrupt": 1},
        "parts": {
            "made": 5,
            "packed": 2,
            "rejected": {"image_corrupt": 2, "image_unreadable": 1},
            "incomplete_samples": {"image_corrupt": 1},
        },
        "media_dropped": {},
    }
    assert account.imbalance() is None
    assert account.losses == {"image_corrupt": 2}


def test_a_part_without_labels_is_counted_and_no_loss_unless_others_were_lost_too() -> None:
    # s: one of two parts has no label. t: that, and a picture. u: the same two, and nothing more.
    results = [
        result(0, 1, failure("s", 0, 2, "no_labels")),
        result(0, 1, failure("t", 0, 3, "no_labels"), failure("t", 1, 3)),
        result(0, 0, failure("u", 0, 2, "no_labels"), failure("u", 1, 2)),
    ]
    account = settle(["web"], {"web": scanned(3)}, {"web": planned(0, 3, 7)}, results)["web"]
    assert account.imbalance() is None and account.split_parts == 2
    assert account.parts_rejected == {"no_labels": 3, "image_corrupt": 2}
    assert account.incomplete == {"no_labels": 1, "image_corrupt": 1} and account.rejected == {
        "image_corrupt": 1
    }
    assert account.losses == {"image_corrupt": 2}


def test_parts_of_equal_keys_in_two_files_rows_or_copies_are_two_samples() -> None:
    for other in ({"unit": "two"}, {"row": 7}, {"copy": 1}):
        results = [result(0, 2, failure("k", 0, 2), failure("k", 1, 2, **other))]
        account = settle(["web"], {"web": scanned(2)}, {"web": planned(0, 2, 4)}, results)["web"]
        assert account.split_parts == 2 and account.imbalance() is None


def test_a_repeated_sample_counts_once_for_every_use() -> None:
    # 4 samples: two left out, one used three times of which one use fails, one that is a duplicate.
    plan = {"web": planned(3, repeated=2, left_out_by_mixture=2, duplicate=1)}
    results = [result(2, 0, failure("a", -1, 1, copy=1))]
    account = settle(["web"], {"web": scanned(4)}, plan, results)["web"]
    assert (account.read, account.repeated, account.packed) == (4, 2, 2) and account.imbalance() is None
    # Of three uses that were wanted, one is lost; what the config leaves out is no loss.
    assert account.losses == {"image_corrupt": 1} and account.wanted == 3


def test_pictures_that_are_dropped_are_a_share_of_those_that_were_to_be_trained_on() -> None:
    scan = {"web": ScanCounts(read=4, media=9, media_dropped=Counter(image_missing=1))}
    results = [result(4, 0, failure("a", -1, 1, media=2))]
    account = settle(["web"], scan, {"web": planned(4)}, results)["web"]
    assert account.media_dropped == {"image_missing": 1, "image_corrupt": 1}
    assert account.media_read == 4 + 1  # planned, and lost before
    assert account.imbalance() is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"read": 8}, "read 8 + repeated 0 != packed 5 + split 1 + rejected 1"),
        ({"repeated": 2}, "read 7 + repeated 2 != packed 5 + split 1 + rejected 1"),
        ({"packed": 4}, "read 7 + repeated 0 != packed 4 + split 1 + rejected 1"),
        ({"parts_made": 4}, "parts made 4 != packed 3 + rejected 0"),
        ({"parts_packed": 2}, "parts made 3 != packed 2 + rejected 0"),
    ],
)
def test_a_lost_sample_or_part_does_not_balance(changes: dict[str, int], message: str) -> None:
    fields: dict[str, Any] = {"read": 7, "packed": 5, "split_parts": 1, "parts_made": 3, "parts_packed": 3}
    account = SourceAccount(**{**fields, **changes})
    account.rejected["no_image"] = 1
    assert account.imbalance() == message


def test_what_the_scan_read_and_rejected_is_summed_over_its_files(tmp_path: Path) -> None:
    units = []
    for name, source, reasons in (("a", "web", ["", "no_image", ""]), ("b", "web", [""]), ("c", "x", [])):
        units.append(IndexedUnit(source, name, tmp_path / f"{name}.parquet"))
        with open_index(units[-1].path) as index:
            for number, reason in enumerate(reasons):
                if reason:
                    index.reject(Reject(source, f"{name}{number}", reason, "why"))
                    continue
                segments = [IndexSegment(IMAGE, "x", 0, 9, 3, 8, 8, 1, 2, 2), IndexSegment(TEXT, "", 0, 0, 5)]
                index.append(ScannedSample(f"{name}{number}", 0, segments, [np.zeros(5, np.int32)]))
                index.reject(Reject(source, f"{name}{number}", "image_missing", "", media=1))
    counts = scan_counts(units)
    rows = {units[0].rejects: 3, units[1].rejects: 1}
    assert counts["web"] == ScanCounts(
        4, 3, Counter(no_image=1), Counter(image_missing=3), units=2, reject_rows=rows
    )
    assert counts["x"] == ScanCounts(units=1)


def test_footers_of_many_files_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(4, timeout=10)

    def read(path: Path) -> dict[str, Any]:
        together.wait()  # passes once four are here
        return read_counts(path)

    units = []
    for number in range(4):
        units.append(IndexedUnit("web", f"{number}", tmp_path / f"{number}.parquet"))
        with open_index(units[-1].path) as index:
            for row in range(number):
                index.append(ScannedSample(f"{number}.{row}", 0, [], []))
    monkeypatch.setattr(account, "read_counts", read)
    monkeypatch.setattr(driver, "read_counts", read)
    assert scan_counts(units)["web"].read == 6
    numbered, num_rows = driver._number(units)
    assert [unit.first_row for unit in numbered] == [0, 0, 1, 3] and num_rows == 6


def test_rejects_are_written_as_they_come(tmp_path: Path) -> None:
    unit = IndexedUnit("web", "a", tmp_path / "a.parquet")
    with open_index(unit.path) as index:
        for number in range(2500):
            index.reject(Reject("web", f"{number}", "empty", "why", media=0 if number % 5 == 4 else -1))
    rejects = pq.ParquetFile(unit.rejects)
    groups = [rejects.metadata.row_group(n).num_rows for n in range(rejects.num_row_groups)]
    assert groups == [1024, 1024, 452]
    assert rejects.read()["key"].to_pylist() == [f"{number}" for number in range(2500)]
    line = scan_counts([unit])["web"]
    assert (line.read, line.rejected, line.media_dropped) == (2000, {"empty": 2000}, {"empty": 500})
