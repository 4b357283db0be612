"""The account, settled by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preprocess.account import SourceAccount, scan_rejects, settle
from preprocess.index import IndexedUnit
from preprocess.samples import INDEX_SCHEMA, Reject

NOTHING = {"whole": 0, "split": 0, "parts": 0}


def failure(
    key: str, part: int, parts: int, reason: str = "image_corrupt", unit: str = "u"
) -> dict[str, Any]:
    """One line of `rejects` in a shard's result file."""
    return {
        "source": "web",
        "key": key,
        "reason": reason,
        "detail": "",
        "part": part if parts > 1 else -1,
        "unit": unit,
        "parts": parts,
    }


def result(whole: int, parts: int, *rejects: dict[str, Any]) -> dict[str, Any]:
    return {"packed": {"web": {"whole": whole, "parts": parts}}, "rejects": list(rejects)}


def test_rejects_of_scan_plan_and_pack_and_two_sources_balance_to_the_unit() -> None:
    early = [
        Reject("web", "a", "no_image", ""),
        Reject("web", "b", "exceeds_L", ""),
        Reject("chat", "c", "no_image", ""),
    ]
    results = [result(3, 0, failure("d", -1, 1)), result(2, 0)]
    planned = {"web": {"whole": 6, "split": 0, "parts": 0}, "chat": NOTHING}
    accounts, rejects = settle(["web", "chat"], {"web": 8, "chat": 1}, early, planned, results)
    assert accounts["web"].as_dict() == {
        "read": 8,
        "packed": 5,
        "split_parts": 0,
        "rejected": {"exceeds_L": 1, "image_corrupt": 1, "no_image": 1},
        "parts": {"made": 0, "packed": 0, "rejected": {}, "incomplete_samples": {}},
    }
    assert accounts["chat"].as_dict()["rejected"] == {"no_image": 1}
    assert [account.imbalance() for account in accounts.values()] == [None, None]
    assert [(reject.key, reject.part) for reject in rejects] == [("a", -1), ("b", -1), ("c", -1), ("d", -1)]


def test_a_cut_sample_counts_as_split_until_its_last_part_fails() -> None:
    # s: one of three parts fails. t: both fail, in different shards, for different reasons.
    results = [
        result(1, 1, failure("s", 1, 3), failure("t", 0, 2)),
        result(0, 1, failure("t", 1, 2, "image_unreadable")),
    ]
    planned = {"web": {"whole": 1, "split": 2, "parts": 5}}
    accounts, rejects = settle(["web"], {"web": 3}, [], planned, results)
    account = accounts["web"]
    assert account.as_dict() == {
        "read": 3,
        "packed": 1,
        "split_parts": 1,
        "rejected": {"image_corrupt": 1},
        "parts": {
            "made": 5,
            "packed": 2,
            "rejected": {"image_corrupt": 2, "image_unreadable": 1},
            "incomplete_samples": {"image_corrupt": 1},
        },
    }
    assert account.imbalance() is None
    assert len(rejects) == 3


def test_parts_of_equal_keys_in_two_files_are_two_samples() -> None:
    results = [result(0, 2, failure("k", 0, 2, unit="one"), failure("k", 1, 2, unit="two"))]
    planned = {"web": {"whole": 0, "split": 2, "parts": 4}}
    accounts, _ = settle(["web"], {"web": 2}, [], planned, results)
    assert accounts["web"].split_parts == 2 and accounts["web"].imbalance() is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"read": 8}, "read 8 != packed 5 + split 1 + rejected 1"),
        ({"packed": 4}, "read 7 != packed 4 + split 1 + rejected 1"),
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
        rows = [
            {"key": f"{name}{number}", "reason": reason, "detail": "why", "segments": []}
            for number, reason in enumerate(reasons)
        ]
        pq.write_table(pa.Table.from_pylist(rows, schema=INDEX_SCHEMA), tmp_path / name)
        units.append(IndexedUnit(source, name, tmp_path / name))
    read, rejects = scan_rejects(units)
    assert read == {"web": 4, "x": 0}
    assert rejects == [Reject("web", "a1", "no_image", "why")]
