"""Tables in a store, and the pictures that they name there."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preprocess.job import run_job
from preprocess.samples import Media, Missing, Place, RawSample, Text
from preprocess.sources import open_source
from preprocess.sources.base import SourceContext
from preprocess.sources.chat import ChatConfig
from preprocess.sources.interleaved import InterleavedConfig
from preprocess.sources.pictures import picture
from preprocess.sources.saved import expand_tables
from preprocess.verify import verify_dataset
from shared import remote
from shared.errors import UserError
from shared.tokens import TokenNames
from tests.preprocess.chat_inputs import STYLES, chat_tokenizer, llava
from tests.preprocess.inputs import make_config, png
from tests.preprocess.reference import Reference
from tests.preprocess.stores import BUCKET, put, s3_server

A, B = png(8, 8, 1), png(8, 16, 2)


@pytest.fixture(scope="module", autouse=True)
def s3() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)


def test_a_picture_in_a_store_is_read_from_its_place() -> None:
    put("images/deep/a.png", A)
    root = f"s3://{BUCKET}/images"
    for name in ("deep/a.png", "x/../deep/a.png", f"{root}/deep/a.png"):
        found = picture(name, root)
        assert isinstance(found, Media)
        assert found.place == Place(f"{root}/deep/a.png", 0, len(A)) and found.file.read() == A


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none.png", "image_missing"),
        ("../other/a.png", "image_outside_root"),
        ("/etc/passwd", "image_outside_root"),
        ("../images-too/a.png", "image_outside_root"),
        ("https://example.org/a.png", "image_not_fetched"),
    ],
)
def test_what_is_not_in_a_store_has_a_reason(name: str, reason: str) -> None:
    found = picture(name, f"s3://{BUCKET}/images")
    assert isinstance(found, Missing) and found.reason == reason


def test_a_conversation_here_finds_its_pictures_in_a_store(tmp_path: Path) -> None:
    put("chat/a.png", A)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(llava("<image>Hi", "Yes.", image="a.png")))
    config = ChatConfig(paths=(str(path),), image_root=f"s3://{BUCKET}/chat")
    context = SourceContext("chat", chat_tokenizer(tmp_path / "tokenizer", STYLES["chatml"]), TokenNames())
    [entry] = open_source(config, context).scan(str(path))
    assert isinstance(entry, RawSample)
    [found] = [segment for segment in entry.segments if not isinstance(segment, Text)]
    assert isinstance(found, Media) and found.place == Place(f"s3://{BUCKET}/chat/a.png", 0, len(A))


def test_a_saved_data_set_in_a_store_is_its_data_files() -> None:
    put("saved/dataset_dict.json", b'{"splits": ["train", "test"]}')
    for split in ("train", "test"):
        put(f"saved/{split}/state.json", b'{"_data_files": [{"filename": "data-0.arrow"}]}')
        put(f"saved/{split}/cache-1.arrow", b"x")
    files = [put(f"saved/{split}/data-0.arrow", b"x") for split in ("test", "train")]
    plain = put("saved/a.txt", b"x")
    for path in (f"s3://{BUCKET}/saved", f"s3://{BUCKET}/saved/"):
        assert expand_tables("web", (path, plain)) == [plain, *files]
    with pytest.raises(UserError, match="/none: "):
        expand_tables("web", (f"s3://{BUCKET}/none",))


def test_documents_in_a_store_are_packed_with_pictures_from_there_and_from_here(tmp_path: Path) -> None:
    put("data/img/a.png", A)
    rows = [
        {"texts": ["one", None], "images": [None, "img/a.png"]},
        {"texts": ["two", None], "images": [None, "img/none.png"]},
    ]
    lines = put("data/a.jsonl", "\n".join(map(json.dumps, rows)).encode())
    file = io.BytesIO()
    pq.write_table(pa.table({"texts": [[None, "three"]], "images": [[B, None]]}), file)
    table = put("data/b.parquet", file.getvalue())
    source = InterleavedConfig(paths=(lines, table), max_reject_rate=1.0)
    config = make_config(tmp_path, tmp_path, sources={"web": source})
    account = run_job(config)["account"]["web"]
    assert account["media_dropped"] == {"image_missing": 1}
    samples = {"a.jsonl#0": ["one", A], "a.jsonl#1": ["two"], "b.parquet#0": [B, "three"]}
    found = Reference(Path(config.output)).check(
        {("web", key): segments for key, segments in samples.items()}
    )
    assert {key for _, key in found} == set(samples)
    assert verify_dataset(Path(config.output))[1] == []
