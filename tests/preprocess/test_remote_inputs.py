"""Raw files in an S3 store and on a web server: the same bytes as on this machine, through broken connections."""

from __future__ import annotations

import errno
import io
import os
import threading
import time
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
    read_ahead,
    read_range,
)
from preprocess.samples import Place
from preprocess.sources.webdataset import WebDataset, WebDatasetConfig
from shared import remote
from shared.errors import UserError
from tests.preprocess.inputs import Reads, mixed_samples, write_samples
from tests.preprocess.stores import (
    BUCKET,
    WebServer,
    proxy_to,
    put,
    s3_server,
    use_s3,
    web_server,
    without_gs,
)
from tests.preprocess.test_tars import CONTEXT, PACK, contents, scan

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
def quick(monkeypatch: pytest.MonkeyPatch, s3: str) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    use_s3(monkeypatch, s3)


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
        ("hf://one-name", "cannot be opened .*'namespace/name'"),
        ("https://", "cannot be opened"),
        ("https:///a.tar", "cannot be opened"),
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
    without_gs(monkeypatch)
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


def test_a_web_server_whose_connections_break_is_asked_again(web: WebServer) -> None:
    (web.directory / "a.bin").write_bytes(CONTENT)
    with proxy_to(web.address) as proxy:
        proxy.budget, proxy.refill, proxy.resets = 20_000, 20_000, 3
        assert read_range(f"{proxy.address}/a.bin", 0, len(CONTENT)) == CONTENT
        assert proxy.broken == 3


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


def test_a_refused_request_is_one_line_and_not_tried_again(
    web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_s3(monkeypatch, web.address)
    web.failures, web.status = 99, 403
    with pytest.raises(UserError, match=r"s3://bucket/secret\.tar: access refused .* credentials for s3://"):
        expand_paths("web", (f"s3://{BUCKET}/secret.tar",))
    assert len(web.paths) <= 2


def test_without_credentials_there_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="credentials for s3://"):
        read_range(f"s3://{BUCKET}/a", 0, 1)


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_a_web_server_that_fails_for_a_moment_is_asked_again(web: WebServer, status: int) -> None:
    (web.directory / "a.bin").write_bytes(CONTENT)
    web.failures, web.status = 3, status
    assert read_range(f"{web.address}/a.bin", 100, 50_000) == CONTENT[100:50_100]
    assert len(web.paths) == 4


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, "no such file or bucket"),
        (410, "no such file or bucket"),
        (403, "access refused"),
        (401, "access refused"),
        (400, "the store answers with status 400"),
    ],
)
def test_what_a_web_server_will_not_give_is_one_line_without_the_secrets_in_its_url(
    web: WebServer, status: int, message: str
) -> None:
    web.failures, web.status = 99, status
    url = f"{web.address.replace('//', '//user:password@')}/a.tar?X-Signature=secret"
    with pytest.raises(UserError, match=rf"'web': {web.address}/a\.tar: {message}") as caught:
        expand_paths("web", (url,))
    assert "secret" not in str(caught.value) and "password" not in str(caught.value)
    assert len(web.paths) == 1


def test_a_web_server_that_stays_away_is_an_error_without_the_secrets_in_its_url(web: WebServer) -> None:
    web.failures = 99
    with pytest.raises(remote.StoreError) as caught:
        read_range(f"{web.address}/a.tar?X-Signature=secret", 0, 10)
    assert caught.value.filename == f"{web.address}/a.tar" and "secret" not in str(caught.value)
    assert len(web.paths) == remote.ATTEMPTS


def test_an_unknown_host_is_one_line() -> None:
    with pytest.raises(UserError, match=r"http://no-such-host\.invalid/a\.tar: its host is not known"):
        expand_paths("web", ("http://no-such-host.invalid/a.tar",))


def test_a_web_server_without_ranges_is_refused_before_anything_is_read(web: WebServer) -> None:
    (web.directory / "a.tar").write_bytes(CONTENT)
    web.ranges = False
    with pytest.raises(UserError, match=r"gives no parts of files; download it and name the copy"):
        expand_paths("web", (f"{web.address}/a.tar",))
    with pytest.raises(UserError, match=r"gives no parts of files"):
        read_range(f"{web.address}/a.tar", 10, len(CONTENT))


def test_a_web_server_has_no_patterns(web: WebServer) -> None:
    with pytest.raises(UserError, match="has no list of its files"):
        expand_paths("web", (f"{web.address}/*.tar",))


def test_a_signed_url_is_one_file_whatever_stands_in_its_query(web: WebServer) -> None:
    (web.directory / "a.tar").write_bytes(CONTENT)
    url = f"{web.address}/a.tar?X-Amz-Credential=a*[b]"
    assert expand_paths("web", (url,)) == [url]
    assert file_state(url)[0] == len(CONTENT)
    (web.directory / "empty").write_bytes(b"")
    assert file_state(f"{web.address}/empty")[0] == 0


@pytest.mark.parametrize("packing", ["plain", *PACK])
def test_tars_in_stores_give_the_samples_of_tars_on_this_machine(
    web: WebServer, tmp_path: Path, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PART_BYTES", 10_000)
    path = write_samples(tmp_path / "web" / "a.tar", mixed_samples(30))
    if packing != "plain":
        path.write_bytes(PACK[packing](path.read_bytes()))
    expected = contents(scan(path))
    for unit in (put(f"{packing}.tar", path.read_bytes()), f"{web.address}/a.tar"):
        config = WebDatasetConfig(paths=(unit,))
        assert contents(list(WebDataset(config, CONTEXT).scan(unit))) == expected
    assert len(expected) == 30


def test_what_the_next_item_reads_is_under_way_while_this_one_is_worked_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    uri = put("ahead", CONTENT)
    (tmp_path / "here").write_bytes(CONTENT)
    begun: list[int] = []
    together = threading.Barrier(8)
    original = remote.read_range

    def read_together(name: str, offset: int, size: int) -> bytes:
        begun.append(offset)
        together.wait(timeout=60)  # broken unless all eight of an item are under way at a time
        return original(name, offset, size)

    monkeypatch.setattr(remote, "read_range", read_together)
    items = [[Place(uri, 1000 * item + number, 10) for number in range(8)] for item in range(3)]
    for item, read in read_ahead(items, lambda item: item):
        following = items.index(item) + 2
        deadline = time.monotonic() + 60
        while len(begun) < 8 * min(following, 3):  # nobody has asked for a byte of this item yet
            assert time.monotonic() < deadline
            time.sleep(0.001)
        for place in item:
            assert read(place) == CONTENT[place.offset : place.offset + 10]
        assert read(Place(str(tmp_path / "here"), 5, 7)) == CONTENT[5:12]
    assert len(begun) == 24


def test_an_error_of_a_read_ahead_is_raised_where_its_bytes_are_asked_for() -> None:
    uri = put("short", b"x" * 10)
    for item, read in read_ahead([(Place(uri, 0, 10),), (Place(uri, 5, 10),)], lambda item: item):
        if item[0].offset:
            with pytest.raises(UserError, match="shorter than at the scan"):
                read(item[0])
        else:
            assert read(item[0]) == b"x" * 10


def test_a_pack_reads_nothing_ahead_of_files_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(CONTENT)
    reads = Reads(monkeypatch)
    items = [(Place(str(tmp_path / "a"), offset, 10),) for offset in (0, 10)]
    (_, first), (_, second) = read_ahead(items, lambda item: item)
    assert reads.bytes == 0
    assert first(items[0][0]) + second(items[1][0]) == CONTENT[:20]
