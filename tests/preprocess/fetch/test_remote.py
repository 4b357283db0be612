"""Outputs in a store: the files of a run on this machine, resumed there, and slices that share one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from preprocess.fetch.config import FetchConfig
from preprocess.fetch.job import run_fetch
from preprocess.samples import Media, RawSample
from preprocess.sources.base import SourceContext
from preprocess.sources.webdataset import WebDataset, WebDatasetConfig
from shared import remote
from shared.config import load_config
from shared.errors import UserError
from shared.files import lock_directory
from shared.remote import StoreError, as_path
from shared.tokens import TokenNames
from tests.preprocess.chat_inputs import llava
from tests.preprocess.fetch.server import PICTURE, Server, serving
from tests.preprocess.fetch.test_job import numbered, words, write_rows
from tests.preprocess.stores import BUCKET, client, proxy_to, s3_server, use_s3


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)


def fetch(output: str, *paths: Path, **options: Any) -> dict[str, Any]:
    return run_fetch(load_config(FetchConfig, None, words(Path(), *paths, output=output, **options)))


def objects(output: str) -> dict[str, bytes]:
    prefix = output.removeprefix(f"s3://{BUCKET}/") + "/"
    store = client()
    names = [
        entry["Key"] for entry in store.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", ())
    ]
    return {
        name.removeprefix(prefix): store.get_object(Bucket=BUCKET, Key=name)["Body"].read() for name in names
    }


def inputs(directory: Path, server: Server, kind: str) -> Path:
    urls = [server.url(f"/ok/{number}") for number in range(4)] + [server.url("/status/x?code=404")]
    rows: dict[str, list[dict[str, Any]]] = {
        "captions": [{"url": url, "caption": "c"} for url in urls],
        "interleaved": [{"texts": ["t", None], "images": [None, url]} for url in urls],
        "chat": [llava("<image>", "A.", image=url) for url in urls],
    }
    return write_rows(directory / "a.jsonl", rows[kind])


@pytest.mark.parametrize("kind", ["captions", "interleaved", "chat"])
def test_a_run_into_a_store_leaves_what_a_run_on_this_machine_does(
    s3: str, server: Server, tmp_path: Path, kind: str
) -> None:
    path, output = inputs(tmp_path, server, kind), f"s3://{BUCKET}/{kind}"
    # One connection: members of a tar lie in the order of arrival.
    options: dict[str, Any] = {"kind": kind, "rows_per_file": 2, "http__connections": 1}
    record = fetch(str(tmp_path / "out"), path, **options)
    assert fetch(output, path, **options) == record and record["complete"]
    expected = {
        str(file.relative_to(tmp_path / "out")): file.read_bytes()
        for file in (tmp_path / "out").rglob("*")
        if file.is_file() and "locks" not in file.parts
    }
    found = objects(output)
    assert found.pop("config.toml").replace(output.encode(), b"") == expected.pop("config.toml").replace(
        str(tmp_path / "out").encode(), b""
    )
    assert found == expected and len(found) == 3 * 3 + 3
    before = dict(server.requests)
    assert fetch(output, path, **options) == record and server.requests == before


def test_what_is_in_a_store_is_not_fetched_again_and_is_read_from_there(
    s3: str, server: Server, tmp_path: Path
) -> None:
    table, output = write_rows(tmp_path / "a.jsonl", numbered(server, 6)), f"s3://{BUCKET}/resumed"
    record = fetch(output, table, rows_per_file=2)
    for name in ("tars/00001.tar", "fetch.json"):
        client().delete_object(Bucket=BUCKET, Key=f"resumed/{name}")
    assert fetch(output, table, rows_per_file=2) == record
    assert server.requests == {f"/ok/{n}": 2 if n in (2, 3) else 1 for n in range(6)}
    source = WebDataset(
        WebDatasetConfig(paths=(f"{output}/tars/*.tar",)), SourceContext("web", tmp_path, TokenNames())
    )
    entries = [entry for unit in source.units() for entry in source.scan(unit)]
    pictures = [e.segments[0] for e in entries if isinstance(e, RawSample)]
    assert [p.file.read() for p in pictures if isinstance(p, Media)] == [PICTURE] * 6


def test_a_run_that_ends_in_the_middle_leaves_whole_files_and_goes_on(
    s3: str, server: Server, tmp_path: Path
) -> None:
    rows = [*numbered(server, 4), *numbered(server, 4, "/fails-first")]
    for row in rows[4:]:  # an outage of the first run
        row["url"] += "?code=503&times=1"
    table, output = write_rows(tmp_path / "a.jsonl", rows), f"s3://{BUCKET}/broken"
    with pytest.raises(UserError, match=r"^s3://bucket/broken: \d of [48] failed \(http_503"):
        fetch(output, table, rows_per_file=4, max_failure_rate=0.4)
    left = objects(output)
    assert "tars/00001.tar" not in left and "fetch.json" not in left
    assert not [name for name in left if name.startswith("locks/")]
    record = fetch(output, table, rows_per_file=4, max_failure_rate=0.4)
    assert record["rows"] == {"read": 8, "fetched": 8, "failed": {}}


@pytest.mark.slow  # each call to the store is tried for seconds
def test_a_store_that_is_gone_for_a_while_costs_the_run_and_no_file(
    s3: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, output = write_rows(tmp_path / "a.jsonl", numbered(server, 40)), f"s3://{BUCKET}/away"
    with proxy_to(s3) as proxy:
        use_s3(monkeypatch, proxy.address)
        proxy.budget = 30_000  # bytes of answers: after the first files, before the last
        with pytest.raises((StoreError, UserError)):
            fetch(output, table, rows_per_file=2, http__connections=1)
        assert proxy.broken
    use_s3(monkeypatch, s3)
    tars = {name for name in objects(output) if name.startswith("tars/")}
    assert 0 < len(tars) < 20
    asked = sum(server.requests.values())
    client().delete_object(Bucket=BUCKET, Key="away/locks/1-of-1/.lock")  # its release was refused, too
    assert fetch(output, table, rows_per_file=2)["rows"]["fetched"] == 40
    assert sum(server.requests.values()) - asked == 40 - 2 * len(tars)


def test_slices_share_an_output_in_a_store_also_when_they_start_together(
    s3: str, server: Server, tmp_path: Path
) -> None:
    table, output = write_rows(tmp_path / "a.jsonl", numbered(server, 8)), f"s3://{BUCKET}/slices"
    run = partial(fetch, output, table, rows_per_file=2)
    with ThreadPoolExecutor(4) as pool:
        records = list(pool.map(lambda number: run(shard=f"{number}/4"), range(1, 5)))
    assert any(record["complete"] for record in records)
    assert json.loads(objects(output)["fetch.json"])["rows"]["fetched"] == 8
    assert server.requests == {f"/ok/{number}": 1 for number in range(8)}


def test_a_store_is_held_by_one_run_of_a_slice_and_changed_settings_are_refused_or_make_all_again(
    s3: str, server: Server, tmp_path: Path
) -> None:
    table, output = write_rows(tmp_path / "a.jsonl", numbered(server, 4)), f"s3://{BUCKET}/held"
    with (
        lock_directory(as_path(f"{output}/locks/1-of-1"), "fetching this slice"),
        pytest.raises(UserError, match="another process is fetching this slice"),
    ):
        fetch(output, table)
    fetch(output, table)
    with pytest.raises(UserError, match="rows_per_file"):
        fetch(output, table, rows_per_file=2)
    fetch(output, table, rows_per_file=2, on_change="rebuild")
    assert len([name for name in objects(output) if name.startswith("tars/")]) == 2
