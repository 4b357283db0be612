"""Chat records with pictures by URL: what is written in their place, what is kept, and a data set made of it."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from preprocess.fetch import conversations
from preprocess.job import run_job
from preprocess.samples import Media, Missing, RawSample
from preprocess.sources import open_source
from preprocess.sources.base import SourceContext
from preprocess.sources.chat import ChatConfig
from preprocess.verify import verify_dataset
from shared.errors import UserError
from shared.tokens import TokenNames
from tests.preprocess.chat_inputs import STYLES, chat_tokenizer, llava, messages
from tests.preprocess.fetch.server import PICTURE, serving
from tests.preprocess.fetch.test_job import failures, fetch
from tests.preprocess.inputs import encode, noise, png
from tests.preprocess.test_chat import make_chat_config

DATA = f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}"


def records_of(path: Path) -> list[dict[str, Any]]:
    data = zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read()
    return [json.loads(line) for line in data.splitlines()]


def written(directory: Path) -> list[dict[str, Any]]:
    paths = sorted((directory / "out" / "conversations").iterdir())
    return [record for path in paths for record in records_of(path)]


def scan(directory: Path, *paths: Path) -> list[RawSample]:
    tokenizer = directory / "tokenizer"
    if not tokenizer.exists():
        chat_tokenizer(tokenizer, STYLES["chatml"])
    config = ChatConfig(paths=tuple(map(str, paths)))
    source = open_source(config, SourceContext("chat", tokenizer, TokenNames()))
    entries = [entry for unit in source.units() for entry in source.scan(unit)]
    assert all(isinstance(entry, RawSample) for entry in entries), entries
    return [entry for entry in entries if isinstance(entry, RawSample)]


def asked(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": "What?"}, *parts]
    return {"messages": [{"role": "user", "content": content}, *messages("", "That.")[1:]], **fields}


def test_a_url_wherever_a_record_may_have_it_becomes_the_picture_and_all_else_stays(tmp_path: Path) -> None:
    with serving() as server:
        good = server.url("/ok/x")
        records = [
            llava("<image>\nWhat?", "A cat.", image=good, id=7, score=0.5),
            llava("<image> <image>", "Two.", image=["a/b.png", {"bytes": None, "path": good}]),
            asked(
                {"type": "image_url", "image_url": {"url": good, "detail": "low"}}, source={"x": [1, None]}
            ),
            asked({"type": "image", "image": good}, {"type": "image_url", "image_url": {"url": DATA}}),
            llava(f"See {good}", f"No, {good}."),  # words of a turn are no pictures
            asked({"type": "video", "video": good}),  # nor are videos
        ]
        path = tmp_path / "a.json"
        path.write_text(json.dumps(records))
        record = fetch(tmp_path, path, kind="chat")
        assert server.requests == {"/ok/x": 1}
    assert record["rows"] == {"read": 6, "fetched": 6, "failed": {}}
    assert record["images"] == {"read": 4, "fetched": 4, "failed": {}}
    assert record["image_bytes"] == 4 * len(PICTURE)
    more = {"image_urls": [good], "image_failures": [None]}
    first = llava("<image>\nWhat?", "A cat.", image=DATA, id=7, score=0.5) | more
    second = llava("<image> <image>", "Two.", image=["a/b.png", {"bytes": None, "path": DATA}]) | more
    third = (
        asked({"type": "image_url", "image_url": {"url": DATA, "detail": "low"}}, source={"x": [1, None]})
        | more
    )
    fourth = asked({"type": "image", "image": DATA}, {"type": "image_url", "image_url": {"url": DATA}}) | more
    assert written(tmp_path) == [first, second, third, fourth, *records[4:]]


def test_a_picture_that_fails_is_counted_and_missing_for_the_chat_source(tmp_path: Path) -> None:
    with serving() as server:
        good, gone, page = (
            server.url(place) for place in ("/ok/x", "/status/x?code=404", "/typed/x?type=text/html")
        )
        secret = "http://me:hunter2@127.0.0.1/x"
        records = [
            llava("<image>", "A.", image=gone, id="scalar"),
            llava("<image><image>", "B.", image=[{"path": page}, good], id="list"),
            asked(
                {"type": "image_url", "image_url": {"url": secret}},
                {"type": "image", "url": good},
                id="parts",
            ),
        ]
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        record = fetch(tmp_path, path, kind="chat", input__key="id")
    reasons = {"http_404": 1, "url_with_credentials": 1, "wrong_type": 1}
    assert record["images"] == {"read": 5, "fetched": 2, "failed": reasons}
    assert failures(tmp_path) == [
        ("scalar", 0, 0, "http_404"),
        ("list", 1, 0, "wrong_type"),
        ("parts", 2, 0, "url_with_credentials"),
    ]
    output = tmp_path / "out" / "conversations" / "00000.jsonl.zst"
    found = records_of(output)
    assert [entry["image_failures"] for entry in found] == [
        ["http_404"],
        ["wrong_type", None],
        ["url_with_credentials", None],
    ]
    assert "hunter2" not in json.dumps(found)
    outline = [
        [
            s.file.read() if isinstance(s, Media) else s.reason
            for s in sample.segments
            if isinstance(s, (Media, Missing))
        ]
        for sample in scan(tmp_path, output)
    ]
    assert outline == [["image_missing"], ["image_missing", PICTURE], ["image_missing", PICTURE]]


def test_tables_of_bytes_and_urls_become_lines_of_the_same_conversations(tmp_path: Path) -> None:
    other = png(3, 4)
    with serving() as server:
        rows = [
            {
                "messages": messages("<image> <image>", "Two."),
                "images": [{"bytes": other, "path": "o.png"}, {"bytes": None, "path": server.url("/ok/x")}],
                "hash": b"\xff",
                "score": float("nan"),
            }
        ]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        record = fetch(tmp_path, tmp_path / "a.parquet", kind="chat")
    assert record["images"] == {"read": 1, "fetched": 1, "failed": {}}
    (found,) = written(tmp_path)
    assert (found["hash"], found["score"], found["messages"]) == ("/w==", None, rows[0]["messages"])
    (sample,) = scan(tmp_path, tmp_path / "out" / "conversations" / "00000.jsonl.zst")
    assert [s.file.read() for s in sample.segments if isinstance(s, Media)] == [other, PICTURE]


def test_rows_that_are_no_records_fail_by_reason_and_a_file_that_is_cut_off_is_refused(
    tmp_path: Path,
) -> None:
    lines = tmp_path / "a.jsonl"
    good = json.dumps(llava("Hi", "Yes."))
    lines.write_text(f"{good}\n{{\n[1]\n{good}\n")
    record = fetch(tmp_path, lines, kind="chat")
    assert record["rows"] == {"read": 4, "fetched": 2, "failed": {"json_invalid": 1, "row_not_object": 1}}
    (tmp_path / "b.json").write_text(f"[{good}, ")
    with pytest.raises(UserError, match=r"b\.json: cannot be read to its end .* repair it or take it out"):
        fetch(tmp_path, tmp_path / "b.json", kind="chat", output=tmp_path / "out2")
    (tmp_path / "c.csv").write_text("a")
    with pytest.raises(UserError, match=r"c\.csv: the name says no format of conversations"):
        fetch(tmp_path, tmp_path / "c.csv", kind="chat", output=tmp_path / "out3")
    lines.write_text(json.dumps({**llava("Hi", "Yes."), "image_urls": []}))
    with pytest.raises(UserError, match="already; rename it"):
        fetch(tmp_path, lines, kind="chat", output=tmp_path / "out4")


def test_a_record_beyond_what_the_chat_source_reads_loses_its_last_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = encode(noise(0, 40, 40))
    with serving() as server:
        server.files["/p"] = body
        urls = [server.url("/p")] * 3
        records = [llava("<image>" * 3, "Three.", image=urls), llava("x" * 20_000, "Long.")]
        path = tmp_path / "a.json"
        path.write_text(json.dumps(records))
        # Room for two of three: base 64 makes 4 of 3 bytes.
        limit = 2 * (4 * len(body) // 3 + 4) + 1000
        assert 3 * (4 * len(body) // 3) > limit and 20_000 > limit
        monkeypatch.setattr(conversations, "MAX_RECORD_BYTES", limit)
        record = fetch(tmp_path, path, kind="chat")
    assert record["images"] == {"read": 3, "fetched": 2, "failed": {"document_too_large": 1}}
    assert record["rows"] == {"read": 2, "fetched": 1, "failed": {"row_too_many_bytes": 1}}
    assert all(len(json.dumps(entry)) < limit for entry in written(tmp_path))


def test_only_the_chunks_that_are_not_there_are_fetched(tmp_path: Path) -> None:
    with serving() as server:
        records = [llava("<image>", "A.", image=server.url(f"/ok/{number}")) for number in range(6)]
        path = tmp_path / "a.json"
        path.write_text(json.dumps(records))
        record = fetch(tmp_path, path, kind="chat", rows_per_file=2)
        before = written(tmp_path)
        (tmp_path / "out" / "conversations" / "00001.jsonl.zst").unlink()
        assert fetch(tmp_path, path, kind="chat", rows_per_file=2) == record
        assert server.requests == {f"/ok/{n}": 2 if n in (2, 3) else 1 for n in range(6)}
    assert written(tmp_path) == before and len(before) == 6


@pytest.mark.parametrize("bad_media", ["reject", "drop"])
def test_fetched_conversations_become_a_data_set_that_is_proven(tmp_path: Path, bad_media: Any) -> None:
    with serving() as server:
        server.files["/big"] = png(16, 16)
        records = [
            llava("<image>\nWhat?", "A cat.", image=server.url("/big")),
            asked({"type": "image_url", "image_url": {"url": server.url("/ok/x")}}),
            asked({"type": "image_url", "image_url": {"url": server.url("/status/x?code=410")}}),
            llava("Hi", "Yes."),
        ]
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        fetch(tmp_path, path, kind="chat", output=tmp_path / "fetched", rows_per_file=3)
    fetched = tmp_path / "fetched" / "conversations" / "*.jsonl.zst"
    config = make_chat_config(tmp_path, fetched, bad_media=bad_media)
    account = run_job(config)["account"]["chat"]
    counts, faults = verify_dataset(Path(config.output))
    assert faults == [] and counts["images"] == 2
    if bad_media == "drop":
        assert account["packed"] == 4 and account["media_dropped"] == {"image_missing": 1}
    else:
        assert account["packed"] == 3 and account["rejected"] == {"image_missing": 1}
