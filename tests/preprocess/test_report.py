"""The statistics of a data set: exact, whatever the number of samples that stream by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preprocess import finish, job
from preprocess.account import scan_counts
from preprocess.config import PlanConfig
from preprocess.index import IndexedUnit
from preprocess.report import distribution
from preprocess.report.distribution import Distribution
from preprocess.samples import Reject, reject_table
from tests.preprocess.inputs import make_config, mixed_samples, png, write_samples
from tests.preprocess.planning import image, plan, text, write_index

PERCENTILES = (5, 50, 95, 100)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 1000])
def test_percentiles_of_a_stream_are_those_of_numpy(count: int) -> None:
    rng = np.random.default_rng(count)
    values = rng.integers(-50, 3000, count) ** 2
    streamed = Distribution()
    for part in np.array_split(values, 7):
        streamed.add(part)
    if not count:
        assert streamed.summary(PERCENTILES) == {"count": 0}
        return
    points = np.percentile(values, PERCENTILES)
    expected = {f"p{p}": round(float(point), 3) for p, point in zip(PERCENTILES, points, strict=True)}
    mean = round(float(values.mean()), 3)
    assert streamed.summary(PERCENTILES) == {"count": count, "mean": mean, **expected}


def test_a_distribution_holds_values_not_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distribution, "MERGE_AT", 1000)
    streamed = Distribution()
    for _ in range(50):
        streamed.add(np.arange(300) % 7)
        assert len(streamed._values) + streamed._num_waiting <= 1000 + 7
    assert streamed.summary((50,)) == {"count": 15_000, "mean": pytest.approx(2.99, abs=0.005), "p50": 3.0}


def test_distributions_of_many_files_are_joined() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 50, 400) for _ in range(5)]
    joined, whole = Distribution(), Distribution()
    whole.add(np.concatenate(parts))
    for part in parts:
        own = Distribution()
        own.add(part)
        joined.join(own)
    assert joined.summary(PERCENTILES) == whole.summary(PERCENTILES)


def test_lengths_and_pictures_of_the_index_are_told_by_source(tmp_path: Path) -> None:
    samples = {
        "web/0": {"a": [image(2, 4), text(9), image(4, 4)], "b": [text(3)]},
        "web/1": {"c": [text(1), text(2)]},
        "chat": {"d": [text(7)]},
    }
    stats = plan(tmp_path, samples).summary["samples"]
    assert stats["web"]["text_tokens_per_sample"] == {
        "count": 3,
        "mean": 5.0,
        "p5": 3.0,
        "p50": 3.0,
        "p95": 8.4,  # between 3 and 9
        "p100": 9.0,
    }
    assert stats["web"]["images_per_sample"]["mean"] == round(2 / 3, 3)
    assert stats["web"]["image_patches"]["count"] == 2 and stats["web"]["image_patches"]["p50"] == 12.0
    # Every picture is 9 pixels wide and 8 high.
    assert stats["web"]["image_aspect_ratio"]["mean"] == pytest.approx(9 / 8, rel=1 / 4000)
    assert stats["chat"]["text_tokens_per_sample"]["p100"] == 7.0
    assert stats["chat"]["image_patches"] == {"count": 0}


def test_rejects_of_all_steps_come_to_one_file_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finish, "ROWS_PER_GROUP", 3)
    units = [IndexedUnit("web", name, tmp_path / "index" / f"{name}.parquet") for name in ("a", "b")]
    write_index(units[0].path, {"a0": "no_image", "a1": "empty"})
    write_index(units[1].path, {"b0": [text(2)]})
    (tmp_path / "plan").mkdir()
    for name in ("train-000001", "train-000000", "duplicates-000000"):
        rows = [Reject("web", f"{name}.{row}", "r", "") for row in range(2)]
        pq.write_table(reject_table(rows), tmp_path / "plan" / f"{name}.rejects.parquet")
    lost = {"source": "web", "key": "z", "reason": "r", "detail": "", "part": 2, "media": -1, "unit": "u"}
    tables = finish._reject_tables(tmp_path, scan_counts(units), [{"rejects": []}, {"rejects": [lost]}])
    finish._write_rejects(tmp_path / "rejects.parquet", tables)
    table: pa.Table = pq.read_table(tmp_path / "rejects.parquet")
    places = ("duplicates-000000", "train-000000", "train-000001")
    planned = [f"{name}.{row}" for name in places for row in range(2)]
    assert table["key"].to_pylist() == ["a0", "a1", *planned, "z"]
    assert table["part"].to_pylist() == [-1] * 8 + [2]
    assert pq.read_metadata(tmp_path / "rejects.parquet").num_row_groups == 3


def test_a_shard_without_rejects_adds_no_table_to_those_that_are_gathered(tmp_path: Path) -> None:
    lost = {"source": "web", "key": "z", "reason": "r", "detail": "", "part": 2, "media": -1}
    results = [{"rejects": []}, {"rejects": [lost]}, {"rejects": []}]
    assert [len(table) for table in finish._reject_tables(tmp_path, {}, results)] == [1]


def test_tables_are_counted_once_however_many_are_gathered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []

    def count(table: pa.Table) -> int:
        counted.append(table.num_rows)
        return table.num_rows

    monkeypatch.setattr(finish, "len", count, raising=False)
    tables = [reject_table([Reject("web", f"{row}", "r", "")]) for row in range(50)]
    finish._write_rejects(tmp_path / "rejects.parquet", tables)
    assert counted == [1] * 50
    assert pq.read_table(tmp_path / "rejects.parquet").num_rows == 50


def test_the_result_of_a_shard_is_read_once_and_again_where_it_has_rejects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[str] = Counter()

    def counted(output: Path, *, read_result: Callable[[str], dict[str, Any]], **others: Any) -> Any:
        def count(name: str) -> dict[str, Any]:
            read[name] += 1
            return read_result(name)

        return finish.finish(output, read_result=count, **others)

    monkeypatch.setattr(job, "finish", counted)
    samples = {**mixed_samples(12), "cut": (png(40, 40)[:-2000], "half a picture")}
    tar = write_samples(tmp_path / "a.tar", samples)
    job.run_job(make_config(tmp_path, tar, plan=PlanConfig(shard_bytes=4096)))
    rejects = pq.read_table(tmp_path / "out" / "rejects.parquet")
    assert rejects["key"].to_pylist() == ["cut"]
    shards = [path.name for path in (tmp_path / "out" / "shards").iterdir()]
    assert len(shards) > 2 and set(read) == set(shards)
    assert sorted(read.values()) == [1] * (len(shards) - 1) + [2]


def test_a_job_without_rejects_has_an_empty_table_of_them(tmp_path: Path) -> None:
    finish._write_rejects(tmp_path / "rejects.parquet", [])
    assert pq.read_table(tmp_path / "rejects.parquet").num_rows == 0
