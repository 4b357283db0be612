"""Headers and bytes of responses: what they say, and what they cannot make us do."""

from __future__ import annotations

import email.utils
import gzip
import io
import tarfile
import time
import tracemalloc
import zlib
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from preprocess.fetch.responses import (
    SNIFF_BYTES,
    FetchError,
    open_inflater,
    opt_out_of,
    parse_url,
    redacted,
    retry_after_s,
    sniff,
)

DIRECTIVES = ("noai", "noimageai", "noindex", "noimageindex")


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], None),
        ([""], None),
        (["nofollow, noarchive"], None),
        (["noai"], "noai"),
        (["NoAI"], "noai"),
        (["nofollow,noimageai"], "noimageai"),
        (["nofollow", " noindex "], "noindex"),
        (["noaim"], None),
        (["parquetry: noai"], "noai"),
        (["Parquetry : nofollow, NoImageIndex"], "noimageindex"),
        (["*: noai"], "noai"),
        (["otherbot: noai"], None),
        (["otherbot: nofollow, noai"], None),  # all of a header is the named agent's
        (["otherbot: noai", "noindex"], "noindex"),
        (["otherbot: noai, parquetry: noindex"], "noindex"),
        (["parquetry: nofollow, otherbot: noai"], None),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST, noai"], "noai"),
        (["max-image-preview: large, noindex"], "noindex"),
        (["otherbot: max-image-preview: large, noindex"], None),
        ([":"], None),
        (["noai: x"], None),  # an agent of that name
    ],
)
def test_opt_out_directives_are_read_as_their_sender_means_them(
    headers: list[str], expected: str | None
) -> None:
    assert opt_out_of(headers, DIRECTIVES, "Parquetry") == expected


def test_without_directives_nothing_opts_out() -> None:
    assert opt_out_of(["noai, noindex"], (), "parquetry") is None


@pytest.mark.parametrize(
    ("header", "expected"),
    [(None, 0), ("", 0), ("7", 7), (" 120 ", 120), ("-5", 0), ("1.5", 0), ("soon", 0), ("9" * 40, 0)],
)
def test_retry_after_in_seconds(header: str | None, expected: float) -> None:
    assert retry_after_s(header) == expected


def test_retry_after_as_a_date() -> None:
    ahead, past = (email.utils.formatdate(time.time() + shift, usegmt=True) for shift in (100, -100))
    assert 98 <= retry_after_s(ahead) <= 100
    assert retry_after_s(past) == 0


@given(st.text())
def test_any_retry_after_is_a_number_of_seconds(header: str) -> None:
    assert 0 <= retry_after_s(header) < 1e12


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://user:secret@host/a?b#c", "http://***@host/a?b#c"),
        ("https://user@host", "https://***@host"),
        ("http://us@er:se@cret@host/", "http://***@host/"),
        ("//user:secret@host/", "//***@host/"),
        ("user:secret@host/x", "***@host/x"),
        ("http://user:sec/ret@host/x", "http://***@host/x"),  # no URL: the password's slash
        ("http://host/picture@2x.png?at=a@b", "http://host/picture@2x.png?at=a@b"),
        ("http://host/", "http://host/"),
        ("", ""),
    ],
)
def test_credentials_are_taken_out_of_what_is_written_down(url: str, expected: str) -> None:
    assert redacted(url) == expected


@given(st.text(max_size=30))
def test_any_text_is_a_checked_url_or_a_reason(text: str) -> None:
    try:
        url = parse_url(text)
    except FetchError as error:
        assert error.reason in ("bad_url", "bad_scheme", "url_with_credentials")
    else:
        assert url.scheme in ("http", "https") and url.host


def inflate(encoding: str, data: bytes, limit: int, piece: int) -> bytes:
    inflater = open_inflater(encoding, limit)
    assert inflater is not None
    made = b"".join(inflater.feed(data[start : start + piece]) for start in range(0, len(data), piece))
    inflater.finish()
    return made


ENCODED = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    " GZIP ": gzip.compress,
}


@pytest.mark.parametrize("encoding", ENCODED)
@given(data=st.binary(min_size=1, max_size=300), piece=st.integers(1, 50))
def test_an_encoded_body_comes_out_as_it_was_in_any_pieces(encoding: str, data: bytes, piece: int) -> None:
    assert inflate(encoding, ENCODED[encoding](data), len(data), piece) == data


@given(data=st.binary(min_size=1, max_size=300), piece=st.integers(1, 50))
def test_deflate_without_its_wrapper_is_understood(data: bytes, piece: int) -> None:
    raw = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    stream = raw.compress(data) + raw.flush()
    assert inflate("deflate", stream, len(data), piece) == data


@given(st.integers(0, 200), st.integers(1, 50))
def test_one_byte_above_the_limit_is_too_large(limit: int, piece: int) -> None:
    with pytest.raises(FetchError) as error:
        inflate("gzip", gzip.compress(bytes(limit + 1)), limit, piece)
    assert error.value.reason == "too_large"
    assert len(inflate("gzip", gzip.compress(bytes(limit)), limit, piece)) == limit


def test_a_bomb_is_left_before_it_is_in_memory() -> None:
    bomb = gzip.compress(bytes(64 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(FetchError, match="too_large"):
            inflate("gzip", bomb, 1000, len(bomb))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20  # the highest
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"plain", "bad_encoding"),
        (gzip.compress(b"data")[:-1], "truncated"),
        (gzip.compress(b"data") + b"more", "bad_encoding"),
    ],
    ids=["not packed", "cut", "more behind"],  # gzip's bytes hold the time
)
def test_a_damaged_encoding_has_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(FetchError) as error:
        inflate("gzip", data, 100, 1000)
    assert error.value.reason == reason


FORMATS = {
    "JPEG": "jpg",
    "PNG": "png",
    "GIF": "gif",
    "WEBP": "webp",
    "BMP": "bmp",
    "TIFF": "tif",
    "JPEG2000": "jp2",
    "AVIF": "avif",
}


@pytest.mark.parametrize("kind", FORMATS)
def test_what_pillow_writes_is_known_by_its_first_bytes(kind: str) -> None:
    codec = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}.get(kind)
    if codec and not features.check(codec):
        pytest.skip(f"Pillow is built without {codec}")
    file = io.BytesIO()
    Image.new("RGB", (9, 5), "red").save(file, kind)
    assert sniff(file.getvalue()[:SNIFF_BYTES]) == FORMATS[kind]


def test_every_real_picture_is_known_by_its_first_bytes(shared_data: Path) -> None:
    kinds: Counter[tuple[str, str | None]] = Counter()
    for path in [*(shared_data / "photos").glob("*.tar"), *(shared_data / "cc12m").glob("*.tar")]:
        with tarfile.open(path) as tar:
            for member in tar:
                extension = member.name.rsplit(".", 1)[-1].lower().replace("jpeg", "jpg")
                if member.isfile() and extension not in ("txt", "json"):
                    file = tar.extractfile(member)
                    assert file is not None
                    kinds[extension, sniff(file.read(SNIFF_BYTES))] += 1
    assert kinds.total() == 129 and all(named == seen for named, seen in kinds), kinds


@pytest.mark.parametrize(
    "head", [b"", b"<!DOCTYPE html>", b"<svg xmlns", b"RIFF....WAVE", b"%PDF-1.7", b"\xff\xd8"]
)
def test_what_is_no_picture_is_none(head: bytes) -> None:
    assert sniff(head) is None
