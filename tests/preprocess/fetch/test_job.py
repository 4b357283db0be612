"""The command from tables to files: what `preprocess run` reads, an account that balances, and a kill at any moment."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preprocess.__main__ import main
from preprocess.fetch.config import FetchConfig
from preprocess.fetch.job import run_fetch
from preprocess.samples import Media, RawSample, Text
from preprocess.sources.base import SourceContext
from preprocess.sources.interleaved import Interleaved, InterleavedConfig
from preprocess.sources.webdataset import WebDataset, WebDatasetConfig
from shared.config import load_config
from shared.errors import UserError
from shared.files import read_json
from shared.tokens import TokenNames
from tests.preprocess.fetch.server import PICTURE, Server, serving

CHECKOUT = Path(__file__).resolve().parents[3]
PICTURE_SHA256 = hashlib.sha256(PICTURE).hexdigest()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(directory: Path, *paths: Path, kind: str = "captions", **options: Any) -> list[str]:
    """Options of a run below `directory`; a key of a table as http__retries."""
    settings = {
        "output": directory / "out",
        "policy__allow_addresses": "127.0.0.0/8",
        "http__retries": 0,
        **options,
    }
    command = ["--input.kind", kind, "--input.paths", *map(str, paths)]
    for name, value in settings.items():
        command += [f"--{name.replace('__', '.')}", str(value)]
    return command


def fetch(directory: Path, *paths: Path, **options: Any) -> dict[str, Any]:
    return run_fetch(load_config(FetchConfig, None, words(directory, *paths, **options)))


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: file.read() for member in tar if (file := tar.extractfile(member))}


def failures(directory: Path) -> list[tuple[Any, ...]]:
    """(key, row, position, reason) of every failure."""
    rows = pq.read_table(directory / "out" / "failures.parquet").to_pylist()
    return [(row["key"], row["row"], row["position"], row["reason"]) for row in rows]


# Captions


@pytest.mark.parametrize("kind", ["captions", "chat"])
def test_a_row_nested_deeper_than_pythons_stack_fails_alone(
    server: Server, tmp_path: Path, kind: str
) -> None:
    rows = [{"url": server.url("/ok/a"), "caption": "a", "image": server.url("/ok/a")} for _ in range(2)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    deep = json.dumps(rows[0])[:-1] + f', "more": {"[" * 600 + "]" * 600}}}\n'
    path.write_text(deep + path.read_text())
    record = fetch(tmp_path, path, kind=kind)
    assert record["rows"] == {"read": 3, "fetched": 2, "failed": {"row_malformed": 1}}


def test_a_table_becomes_tars_that_the_webdataset_source_reads(server: Server, tmp_path: Path) -> None:
    rows = [
        {"url": server.url("/ok/one"), "caption": " a cat ", "score": 0.5},
        {"url": server.url("/status/x?code=404"), "caption": "gone"},
        {"url": server.url("/typed/x?type=text/html"), "caption": "a page"},
        {"url": server.url("/ok/two"), "caption": "猫"},
        {"url": server.url("/ok/three"), "caption": "third"},
    ]
    record = fetch(tmp_path, write_rows(tmp_path / "a.jsonl", rows), rows_per_file=3)
    assert record == {
        "complete": True,
        "kind": "captions",
        "rows": {"read": 5, "fetched": 3, "failed": {"http_404": 1, "wrong_type": 1}},
        "image_bytes": 3 * len(PICTURE),
    }
    assert record.items() <= read_json(tmp_path / "out" / "fetch.json").items()
    tars = sorted((tmp_path / "out" / "tars").iterdir())
    assert [path.name for path in tars] == ["00000.tar", "00001.tar"]
    context = SourceContext("web", tmp_path, TokenNames())
    source = WebDataset(WebDatasetConfig(paths=tuple(map(str, tars))), context)
    found: dict[str, str] = {}
    for entry in [entry for path in tars for entry in source.scan(str(path))]:
        assert isinstance(entry, RawSample)
        picture, caption = entry.segments
        assert isinstance(picture, Media) and picture.file.read() == PICTURE
        assert isinstance(caption, Text)
        found[entry.key] = caption.text
    assert found == {"0000000000": "a cat", "0000000003": "猫", "0000000004": "third"}
    assert json.loads(members(tars[0])["0000000000.json"]) == {
        "key": "0000000000",
        "url": server.url("/ok/one"),
        "sha256": PICTURE_SHA256,
        "row": rows[0],
    }
    assert sorted(failures(tmp_path)) == [
        ("0000000001", 1, None, "http_404"),
        ("0000000002", 2, None, "wrong_type"),
    ]


def test_rows_that_cannot_become_samples_are_failures_and_nothing_is_asked_for(tmp_path: Path) -> None:
    with serving() as server:
        url = server.url("/ok/x")
        rows: list[Any] = [
            {"url": url, "caption": "good", "id": "a"},
            {"url": url, "caption": "again", "id": "a"},
            {"url": server.url("/ok/never"), "caption": " ", "id": "b"},
            {"url": None, "caption": "c", "id": "c"},
            {"url": server.url("/ok/never"), "caption": "no key"},
            {"url": server.url("/ok/never"), "caption": "long", "id": "x" * 201},
            ["no row"],
        ]
        record = fetch(tmp_path, write_rows(tmp_path / "a.jsonl", rows), input__key="id")
        assert server.requests == {"/ok/x": 1}
    reasons = ["duplicate_key", "no_caption", "no_url", "no_key", "key_too_long", "row_malformed"]
    assert record["rows"] == {"read": 7, "fetched": 1, "failed": dict.fromkeys(sorted(reasons), 1)}
    assert [reason for *_, reason in failures(tmp_path)] == reasons


def test_a_url_that_several_rows_name_is_asked_for_once_and_stored_for_each(tmp_path: Path) -> None:
    with serving() as server:
        rows = [{"url": server.url("/ok/same"), "caption": f"caption {number}"} for number in range(5)]
        assert fetch(tmp_path, write_rows(tmp_path / "a.jsonl", rows))["rows"]["fetched"] == 5
        assert server.requests == {"/ok/same": 1}
    found = members(tmp_path / "out" / "tars" / "00000.tar")
    assert len(found) == 15 and found["0000000004.png"] == PICTURE and found["0000000004.txt"] == b"caption 4"


def test_keys_that_a_member_cannot_have_are_escaped_and_kept(server: Server, tmp_path: Path) -> None:
    ids = ["a.b/c.jpg", "..", "é%", ".hidden", "/etc/passwd"]
    rows = [{"url": server.url("/ok/x"), "caption": "c", "id": id} for id in ids]
    fetch(tmp_path, write_rows(tmp_path / "a.jsonl", rows), input__key="id")
    found = members(tmp_path / "out" / "tars" / "00000.tar")
    names = ["a%2Eb%2Fc%2Ejpg", "%2E%2E", "%C3%A9%25", "%2Ehidden", "%2Fetc%2Fpasswd"]
    assert [name.split(".")[0] for name in found if name.endswith(".json")] == names
    assert [json.loads(found[f"{name}.json"])["row"]["id"] for name in names] == ids


def test_values_of_parquet_that_json_lacks_are_written_as_json(server: Server, tmp_path: Path) -> None:
    import datetime

    row = {"url": server.url("/ok/x"), "caption": "c", "nan": float("nan"), "raw": b"\xff"}
    row |= {"day": datetime.date(2024, 2, 29), "list": [{"n": float("inf")}]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    fetch(tmp_path, tmp_path / "a.parquet")
    about = json.loads(members(tmp_path / "out" / "tars" / "00000.tar")["0000000000.json"])
    assert about["row"] == {
        "url": row["url"],
        "caption": "c",
        "nan": None,
        "raw": "/w==",
        "day": "2024-02-29",
        "list": [{"n": None}],
    }


def test_no_password_is_written_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"url": f"http://user:hunter2@{host}/x", "caption": "c"} for host in ("127.0.0.1", "host:port", "[")
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)
    documents = write_rows(tmp_path / "b.jsonl", [{"texts": [None], "images": [row["url"]]} for row in rows])
    fetch(tmp_path, path)
    fetch(tmp_path, documents, kind="interleaved", output=tmp_path / "out2")
    said = capsys.readouterr()
    assert "hunter2" not in said.out + said.err
    urls = pq.read_table(tmp_path / "out" / "failures.parquet")["url"].to_pylist()
    assert urls == ["http://***@127.0.0.1/x", "http://***@host:port/x", "http://***@[/x"]
    for written in [*(tmp_path / "out").rglob("*"), *(tmp_path / "out2").rglob("*.json")]:
        assert written.is_dir() or b"hunter2" not in written.read_bytes(), written
    for table in (tmp_path / "out2").rglob("*.parquet"):
        assert "hunter2" not in str(pq.read_table(table).to_pylist()), table


# Documents


def test_documents_live_on_without_the_pictures_that_failed(tmp_path: Path) -> None:
    with serving() as server:
        good, gone = server.url("/ok/x"), server.url("/status/x?code=410")
        rows: list[Any] = [
            {"texts": ["a", None, "b", None], "images": [None, good, None, gone], "meta": "m", "n": {"x": 1}},
            {"texts": "no list", "images": [good]},
            {"texts": [None, None], "images": [good, good]},
            {"texts": ["only text"], "images": [None]},
            {"texts": ["no list"], "images": None},
            {"texts": ["no list"], "images": ""},
        ]
        record = fetch(tmp_path, write_rows(tmp_path / "a.jsonl", rows), kind="interleaved")
        assert server.requests == {"/ok/x": 1, "/status/x?code=410": 1}
    assert record["rows"] == {"read": 6, "fetched": 4, "failed": {"row_malformed": 2}}
    assert record["images"] == {"read": 4, "fetched": 3, "failed": {"http_410": 1}}
    table = pq.read_table(tmp_path / "out" / "documents" / "00000.parquet")
    assert table.to_pylist() == [
        {
            "images": [None, PICTURE, None, None],
            "texts": ["a", None, "b", None],
            "meta": "m",
            "n": '{"x": 1}',
            "image_urls": [None, good, None, gone],
            "image_failures": [None, None, None, "http_410"],
        },
        {
            "images": [PICTURE, PICTURE],
            "texts": [None, None],
            "meta": None,
            "n": None,
            "image_urls": [good, good],
            "image_failures": [None, None],
        },
        {
            "images": [None],
            "texts": ["only text"],
            "meta": None,
            "n": None,
            "image_urls": [None],
            "image_failures": [None],
        },
        {
            "images": None,
            "texts": ["no list"],
            "meta": None,
            "n": None,
            "image_urls": None,
            "image_failures": None,
        },
    ]
    assert failures(tmp_path) == [
        ("0000000001", 1, None, "row_malformed"),
        ("0000000005", 5, None, "row_malformed"),
        ("0000000000", 0, 3, "http_410"),
    ]


def test_the_interleaved_source_reads_the_documents_as_they_are(server: Server, tmp_path: Path) -> None:
    rows = [
        {
            "texts": ["a", None, "b", None],
            "images": [None, server.url("/ok/x"), None, server.url("/empty/x")],
        },
        {"texts": ["c"], "images": None},
    ]
    fetch(tmp_path, write_rows(tmp_path / "a.jsonl", rows), kind="interleaved")
    path = str(tmp_path / "out" / "documents" / "00000.parquet")
    source = Interleaved(InterleavedConfig(paths=(path,)), SourceContext("web", tmp_path, TokenNames()))
    found: list[list[str | bytes]] = []
    for entry in source.scan(path):
        assert isinstance(entry, RawSample)
        found.append([])
        for segment in entry.segments:
            assert isinstance(segment, (Text, Media))
            found[-1].append(segment.text if isinstance(segment, Text) else segment.file.read())
    assert found == [["a", PICTURE, "b"], ["c"]]


def test_a_document_beyond_what_parquet_holds_loses_its_last_pictures(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("preprocess.fetch.documents.MAX_DOCUMENT_BYTES", 2 * len(PICTURE))
    row = {"texts": [None] * 3, "images": [server.url("/ok/x")] * 3}
    record = fetch(tmp_path, write_rows(tmp_path / "a.jsonl", [row]), kind="interleaved")
    assert record["images"] == {"read": 3, "fetched": 2, "failed": {"document_too_large": 1}}


def test_real_documents_come_back_as_they_were(shared_data: Path, tmp_path: Path) -> None:
    """Their pictures behind URLs of a server, in the schema that documents with URLs have."""
    source = shared_data / "interleaved"
    original = pq.read_table(source / "interleaved-bytes-00001-of-00002.parquet")
    urls_schema = pq.read_schema(source / "interleaved-urls-00000-of-00001.parquet")
    with serving() as server:
        rows = original.to_pylist()
        for row in rows:
            for position, image in enumerate(row["images"]):
                if image is not None:
                    path = "/" + hashlib.sha256(image).hexdigest()
                    server.files[path] = image
                    row["images"][position] = server.url(path)
        pq.write_table(pa.Table.from_pylist(rows, schema=urls_schema), tmp_path / "a.parquet")
        config = {"kind": "interleaved", "rows_per_file": 20, "input__paths": tmp_path / "a.parquet"}
        record = fetch(tmp_path, **config)
        assert record["images"]["failed"] == {} and record["images"]["read"] > 50
    files = sorted((tmp_path / "out" / "documents").iterdir())
    assert len(files) == 3  # 51 documents
    table = pa.concat_tables(pq.read_table(path) for path in files)
    assert table.schema.field("images").type == original.schema.field("images").type
    assert table.select(original.column_names).to_pylist() == original.to_pylist()


# Resume, slices, settings


def numbered(server: Server, count: int, path: str = "/ok") -> list[dict[str, str]]:
    return [{"url": server.url(f"{path}/{number}"), "caption": f"c{number}"} for number in range(count)]


def test_a_killed_run_goes_on_and_fetches_nothing_twice_that_was_stored(tmp_path: Path) -> None:
    with serving() as server:
        rows = [{**row, "url": row["url"] + "?s=0.05"} for row in numbered(server, 60, "/slow")]
        table = write_rows(tmp_path / "a.jsonl", rows)
        (tmp_path / "config.toml").write_text("")
        options = words(tmp_path, table, rows_per_file=10, http__connections_per_host=2)
        command = [sys.executable, "-m", "preprocess", "fetch", str(tmp_path / "config.toml"), *options]
        asked: dict[str, int] = {}  # of what was stored, how often it had been asked for
        kills = 0
        for kills in range(4):
            before = len(stored_paths(tmp_path))
            process = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            while process.poll() is None and (kills == 3 or len(stored_paths(tmp_path)) == before):
                time.sleep(0.01)
            if kills < 3:  # a file more is there, and the next ones are under way
                process.kill()
            said = process.communicate()
            assert process.returncode == (0 if kills == 3 else -signal.SIGKILL), said
            for path in stored_paths(tmp_path):
                number = int(path.split(".")[0])
                target = f"/slow/{number}?s=0.05"
                assert asked.setdefault(target, server.requests[target]) == server.requests[target]
        assert len(asked) == 60 and kills == 3
        record = fetch(tmp_path, table, rows_per_file=10, http__connections_per_host=2)
        assert asked == server.requests  # a finished run asks for nothing
    assert record["rows"] == {"read": 60, "fetched": 60, "failed": {}}
    assert sorted(stored_paths(tmp_path)) == [f"{number:010d}.png" for number in range(60)]
    assert not list((tmp_path / "out").rglob("*.tmp"))


def stored_paths(directory: Path) -> list[str]:
    """The pictures in all tars that are there."""
    tars = (directory / "out" / "tars").glob("*.tar")
    return [name for path in tars for name in members(path) if name.endswith(".png")]


def test_a_file_whose_counts_were_written_but_which_is_not_there_is_made(
    server: Server, tmp_path: Path
) -> None:
    table = write_rows(tmp_path / "a.jsonl", numbered(server, 4))
    record, tar = fetch(tmp_path, table, rows_per_file=2), tmp_path / "out" / "tars" / "00001.tar"
    whole = set(members(tar))
    os.rename(tar, tar.with_name("00001.tar.0a1b2c3d.tmp"))  # killed one call before the end
    (tmp_path / "out" / "fetch.json").unlink()
    assert fetch(tmp_path, table, rows_per_file=2) == record
    assert set(members(tar)) == whole and not list((tmp_path / "out").rglob("*.tmp"))


def test_slices_share_an_output_and_the_last_one_completes_it(server: Server, tmp_path: Path) -> None:
    table = write_rows(tmp_path / "a.jsonl", numbered(server, 25))
    for shard, made in (("2/3", [1]), ("1/3", [0, 1, 3]), ("3/3", [0, 1, 2, 3, 4])):
        record = fetch(tmp_path, table, rows_per_file=5, shard=shard)
        numbers = sorted(int(path.stem) for path in (tmp_path / "out" / "tars").iterdir())
        assert set(made) <= set(numbers) and record["complete"] == (shard == "3/3")
        assert (tmp_path / "out" / "fetch.json").exists() == record["complete"]
    assert record["rows"] == {"read": 25, "fetched": 25, "failed": {}}


def test_slices_that_start_together_do_not_take_each_other_for_strangers(
    server: Server, tmp_path: Path
) -> None:
    for attempt in range(5):
        directory = tmp_path / str(attempt)
        directory.mkdir()
        table = write_rows(directory / "a.jsonl", numbered(server, 8))
        run = partial(fetch, directory, table, rows_per_file=2)
        with ThreadPoolExecutor(4) as pool:
            records = list(pool.map(lambda number, run=run: run(shard=f"{number}/4"), range(1, 5)))
        assert any(record["complete"] for record in records)
        assert read_json(directory / "out" / "fetch.json")["rows"]["fetched"] == 8


def test_changed_settings_are_refused_or_make_all_again(server: Server, tmp_path: Path) -> None:
    table = write_rows(tmp_path / "a.jsonl", numbered(server, 4))
    fetch(tmp_path, table)
    for change, name in (
        ({"rows_per_file": 2}, "rows_per_file"),
        ({"policy__max_bytes": 10}, "policy.max_bytes"),
        ({"input__caption": ""}, "input.caption"),
    ):
        with pytest.raises(UserError, match=name):
            fetch(tmp_path, table, **change)
    fetch(tmp_path, table, http__connections=2, max_failure_rate=0.5)  # changes no byte
    table.write_text(table.read_text() + json.dumps(numbered(server, 1)[0]) + "\n")
    with pytest.raises(UserError, match="inputs"):
        fetch(tmp_path, table)
    assert fetch(tmp_path, table, rows_per_file=2, on_change="rebuild")["rows"]["read"] == 5
    assert len(list((tmp_path / "out" / "tars").iterdir())) == 3


def test_a_file_above_the_ceiling_of_failures_is_not_kept(tmp_path: Path) -> None:
    with serving() as server:
        rows = [*numbered(server, 4), *numbered(server, 4, "/fails-first")]
        for row in rows[4:]:  # an outage of this run only
            row["url"] += "?code=503&times=1"
        table = write_rows(tmp_path / "a.jsonl", rows)
        with pytest.raises(UserError, match=r"4 of [48] failed \(http_503 4\)"):
            fetch(tmp_path, table, rows_per_file=4, max_failure_rate=0.4)
        assert not (tmp_path / "out" / "tars" / "00001.tar").exists()
        record = fetch(tmp_path, table, rows_per_file=4, max_failure_rate=0.4)
    assert record["rows"] == {"read": 8, "fetched": 8, "failed": {}}


def test_two_runs_of_one_slice_do_not_meet(server: Server, tmp_path: Path) -> None:
    from shared.files import lock_directory

    table = write_rows(tmp_path / "a.jsonl", numbered(server, 1))
    with (
        lock_directory(tmp_path / "out" / "locks" / "1-of-1", "fetching this slice"),
        pytest.raises(UserError, match="another process is fetching this slice"),
    ):
        fetch(tmp_path, table)


# The command


def test_the_command_prints_the_account_for_people_and_one_object_for_scripts(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*numbered(server, 2), {"url": server.url("/status/x?code=404"), "caption": "c"}]
    table = write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "config.toml").write_text("")
    command = ["fetch", str(tmp_path / "config.toml"), *words(tmp_path, table)]
    assert main(command) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == "rows: 3 read = 2 fetched + 1 failed (http_404 1)" and said.err == ""
    assert main([*command, "--json"]) == 0
    said = capsys.readouterr()
    record = json.loads(said.out)
    assert record["output"] == str(tmp_path / "out") and record["rows"]["fetched"] == 2 and said.err == ""


def test_a_fetch_of_nothing_at_all_is_a_mistake_whatever_may_fail(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_rows(tmp_path / "a.jsonl", numbered(server, 3))
    (tmp_path / "config.toml").write_text("")
    command = ["fetch", str(tmp_path / "config.toml"), *words(tmp_path, table, input__key="kye")]
    assert main(command) == 2
    said = capsys.readouterr()
    assert said.out.startswith("rows: 3 read = 0 fetched + 3 failed (no_key 3)\n")
    assert "nothing was fetched (no_key 3); correct [input]" in said.err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "the first argument is the config, a TOML file; see configs/preprocess/fetch.toml"),
        ("", "missing key 'output'"),
        ('output = "o"\n[input]\nkind = "captions"\npaths = ["x"]\ntexts = "t"', "unknown key 'input.texts'"),
        (
            'output = "o"\n[input]\nkind = "tables"\npaths = ["x"]',
            "'tables' is not one of captions, interleaved, chat",
        ),
    ],
)
def test_a_wrong_config_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str | None, message: str
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(config or "")
    assert main(["fetch", *([] if config is None else [str(path)])]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and said.out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard": "0/3"}, 'shard must be like "3/16"'),
        ({"shard": "4/3"}, 'shard must be like "3/16"'),
        ({"shard": "1-3"}, 'shard must be like "3/16"'),
        ({"shard": "1/3", "on_change": "rebuild"}, "remove the output yourself"),
        ({"output": "https://example.org/out"}, "not a place for outputs; use a local path, s3:// or gs://"),
        ({"output": ""}, "output is empty; name a directory"),
        ({"rows_per_file": 0}, "rows_per_file must be at least 1, got 0"),
        ({"max_failure_rate": 2.0}, "max_failure_rate must lie in"),
        ({"http__retries": -1}, r"\[http\] retries must be at least 0, got -1"),
        ({"http__read_timeout_s": 0}, "read_timeout_s must be above 0"),
        ({"policy__allow_addresses": "10.0.0.1/8"}, "allow_addresses: 10.0.0.1/8 has host bits set"),
        ({"policy__formats": "svg"}, "'svg' is not one of jpg, png"),
        ({"http__connections": 10**9}, "needs 2000000128 open files"),
    ],
)
def test_wrong_options_are_one_line_that_names_them(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    table = write_rows(tmp_path / "a.jsonl", [{"url": "http://127.0.0.1/", "caption": "c"}])
    with pytest.raises(UserError, match=message):
        fetch(tmp_path, table, **options)
    assert not (tmp_path / "out" / "tars").exists()


def test_more_connections_than_open_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 200))
    table = write_rows(tmp_path / "a.jsonl", [{"url": "http://h/1", "caption": "c"}])
    with pytest.raises(
        UserError, match=r"http\.connections 64 needs 256 open files, the limit is 200; lower it"
    ):
        fetch(tmp_path, table, http__connections=64)


def test_inputs_without_a_row_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(UserError, match="hold no row"):
        fetch(tmp_path, tmp_path / "a.jsonl")
