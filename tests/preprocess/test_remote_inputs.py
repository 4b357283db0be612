"""Raw files in an S3 store and on a web server: the same bytes as on this machine, through broken connections."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from preprocess.inputs import (
    Span,
    expand_paths,
    file_state,
    file_states,
    local_copy,
    open_input,
    read_range,
)
from shared import remote
from shared.errors import UserError
from tests.preprocess.stores import BUCKET, WebServer, proxy_to, put, s3_server, use_s3, web_server

CONTENT = bytes(range(256)) * 400  # 102,400 bytes


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebServer]:
    (tmp_path / "web").mkdir()
    with web_server(tmp_path / "web") as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)


def test_patterns_name_objects_as_they_name_files(s3: str) -> None:
    uris = [put(f"tars/{name}", b"x") for name in ("b.tar", "a.tar", "deep/c.tar", "a.txt")]
    assert expand_paths("web", (f"s3://{BUCKET}/tars/*.tar", uris[0])) == [uris[1], uris[0]]
    assert expand_paths("web", (f"s3://{BUCKET}/tars/**/*.tar",)) == [uris[1], uris[0], uris[2]]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (f"s3://{BUCKET}/none.tar", "no such file or bucket"),
        ("s3://no-such-bucket/a.tar", "no such file or bucket"),
        (f"s3://{BUCKET}/none/*.tar", "matches no file"),
        ("s3://no-such-bucket/*.tar", "matches no file"),
        (f"s3://{BUCKET}/folder", "a directory; name its files"),
        ("nowhere://a/b", "cannot be opened .*nowhere"),
        (
            "gs://bucket-of-nobody/a.tar",
            "the client of gs:// is not installed; pip install 'parquetry\\[gcs\\]'",
        ),
    ],
)
def test_what_is_not_there_is_one_line_that_names_it(
    s3: str, path: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("folder/a", b"x")
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(UserError, match=message) as caught:
        expand_paths("web", (path,))
    assert path.rstrip("*") in str(caught.value) and "'web'" in str(caught.value)
    assert "sources.web.paths" in str(caught.value)


def test_a_range_of_an_object_is_its_bytes_and_a_shorter_object_is_an_error(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = put("range", CONTENT)
    assert read_range(uri, 300, 70_000) == CONTENT[300:70_300]
    assert read_range(uri, 0, 0) == b""
    monkeypatch.setattr(remote, "PART_BYTES", 30_000)
    assert read_range(uri, 1, len(CONTENT) - 1) == CONTENT[1:]
    for offset in (len(CONTENT) - 10, len(CONTENT) + 5):
        with pytest.raises(UserError, match=r"bucket/range is shorter than at the scan"):
            read_range(uri, offset, 11)


def test_an_object_is_read_as_a_file_from_its_start_or_anywhere(s3: str) -> None:
    uri = put("file", CONTENT)
    with open_input(uri) as file:
        assert file.read(1000) == CONTENT[:1000]
        assert file.seek(-500, io.SEEK_END) == len(CONTENT) - 500
        assert file.read() == CONTENT[-500:]
    assert Span(uri, 256, 512).read() == CONTENT[256:768]


def test_a_state_changes_when_the_object_is_written_again(s3: str) -> None:
    uri = put("state", b"one")
    before = file_state(uri)
    assert file_states([uri, uri]) == [before, before]
    put("state", b"two")
    assert before[0] == file_state(uri)[0] == 3 and before != file_state(uri)


def test_a_copy_of_an_object_is_read_in_parts_and_goes_with_its_last_reader(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = put("copied", CONTENT)
    monkeypatch.setattr(remote, "PART_BYTES", 10_000)
    copy = local_copy(uri)
    assert isinstance(copy, io.FileIO)
    span = Span(copy, 100, 50_000)
    number = copy.fileno()
    del copy
    assert span.read() == CONTENT[100:50_100]
    assert os.readlink(f"/proc/self/fd/{number}").endswith("(deleted)")
    del span
    assert not os.path.exists(f"/proc/self/fd/{number}")


def test_broken_connections_are_tried_again_until_the_bytes_are_there(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = put("broken", CONTENT)
    with proxy_to(s3) as proxy:
        use_s3(monkeypatch, proxy.address)
        proxy.budget, proxy.resets = 0, 3
        assert read_range(uri, 0, len(CONTENT)) == CONTENT
        assert proxy.broken == 3
    monkeypatch.undo()
    use_s3(pytest.MonkeyPatch(), s3)


def test_a_store_that_stays_away_is_an_error_of_the_system_that_names_the_object(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = put("away", CONTENT)
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    with proxy_to(s3) as proxy, monkeypatch.context() as patch:
        use_s3(patch, proxy.address)
        patch.setattr("s3fs.S3FileSystem.retries", 1)
        proxy.budget = 0
        with pytest.raises(OSError) as caught:
            read_range(uri, 0, 10)
        assert proxy.broken >= 2
    assert caught.value.errno == errno.EIO and caught.value.filename == uri
    use_s3(pytest.MonkeyPatch(), s3)
