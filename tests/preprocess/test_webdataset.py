"""webdataset tars: what is a sample, what is a reject, and that every byte read by offset is the member's."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import BinaryIO

import pytest

from preprocess.config import ImageLimits
from preprocess.images import Header, ImageError, read_header
from preprocess.inputs import read_range
from preprocess.samples import Media, RawSample, Reject, Text
from preprocess.sources import open_source
from preprocess.sources.base import Source, SourceContext
from preprocess.sources.webdataset import MAX_CAPTION_BYTES, WebDatasetConfig
from shared.errors import UserError
from shared.tokens import TokenNames
from tests.preprocess.inputs import Members, Reads, encode, noise, png, write_tar

PICTURE = b"the bytes of a picture, which nobody looks at here"


def open_tars(path: Path, caption: str = "txt") -> Source:
    context = SourceContext("web", Path("unused"), TokenNames())
    return open_source(WebDatasetConfig(paths=(str(path),), caption=caption), context)


def scan(path: Path, caption: str = "txt") -> list[RawSample | Reject]:
    return list(open_tars(path, caption).scan(str(path)))


def content(entry: RawSample | Reject) -> list[str | bytes]:
    """What the segments of a sample hold, pictures read whole."""
    return [picture_of(entry).read(), caption_of(entry)]


def media_of(entry: RawSample | Reject) -> Media:
    assert isinstance(entry, RawSample)
    picture = entry.segments[0]
    assert isinstance(picture, Media)
    return picture


def picture_of(entry: RawSample | Reject) -> BinaryIO:
    return media_of(entry).file


def caption_of(entry: RawSample | Reject) -> str:
    assert isinstance(entry, RawSample)
    caption = entry.segments[1]
    assert isinstance(caption, Text)
    return caption.text


def captions(entries: list[RawSample | Reject]) -> dict[str, str]:
    return {entry.key: caption_of(entry) for entry in entries if isinstance(entry, RawSample)}


def reasons(entries: list[RawSample | Reject]) -> list[tuple[str, str]]:
    return [(entry.key, entry.reason) for entry in entries if isinstance(entry, Reject)]


def test_members_of_one_key_are_one_sample_of_image_then_caption(tmp_path: Path) -> None:
    members = [
        ("b.txt", b"two"),
        ("a.jpg", PICTURE),
        ("b.png", b"other"),
        ("a.txt", b"one"),
        ("a.json", b"{}"),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    entries = scan(path)
    assert [(e.key, content(e)) for e in entries] == [
        ("b", [b"other", "two"]),  # in order of first appearance
        ("a", [PICTURE, "one"]),
    ]


def test_a_key_is_the_path_up_to_the_first_dot_of_the_name(tmp_path: Path) -> None:
    members = [
        ("d.1/a.b.jpg", b"?"),
        ("d.1/a.jpg", PICTURE),
        ("d.1/a.txt", b"x"),
        ("a.PNG", b"p"),
        ("a.TXT", b"y"),
    ]
    assert captions(scan(write_tar(tmp_path / "a.tar", members))) == {"d.1/a": "x", "a": "y"}


@pytest.mark.parametrize(
    ("members", "key", "reason"),
    [
        ([("a.txt", b"x")], "a", "no_image"),
        ([("a.jpg", b"p"), ("a.json", b"{}")], "a", "no_caption"),
        ([("a.jpg", b"p"), ("a.txt", b"")], "a", "caption_empty"),
        ([("a.jpg", b"p"), ("a.txt", b" \r\n\t ")], "a", "caption_empty"),
        ([("a.jpg", b"p"), ("a.txt", "\ufeff ".encode())], "a", "caption_empty"),
        ([("a.jpg", b"p"), ("a.txt", b"caf\xe9")], "a", "caption_not_utf8"),
        ([("a.jpg", b"p"), ("a.txt", b"\xed\xa0\x80")], "a", "caption_not_utf8"),  # a lone surrogate
        ([("README", b"x")], "README", "no_image"),
        ([("a.jpg", b"p"), ("a.png", b"q"), ("a.txt", b"x")], "a", "several_images"),
    ],
)
def test_an_unusable_sample_is_a_reject_with_its_reason(
    tmp_path: Path, members: Members, key: str, reason: str
) -> None:
    entries = scan(write_tar(tmp_path / "a.tar", members))
    assert reasons(entries) == [(key, reason)] and len(entries) == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"caption": " a cat ", "n": 1}', "a cat"),
        (b'\xef\xbb\xbf{"caption": "a cat"}', "a cat"),
        (b'{"caption": "\\u732b"}', "猫"),
        (b'{"caption": 7}', "no_caption"),
        (b'{"caption": null}', "no_caption"),
        (b'{"title": "a cat"}', "no_caption"),
        (b'["caption"]', "no_caption"),
        (b'{"caption": ""}', "caption_empty"),
        (b'{"caption": "a cat"', "json_invalid"),
        (b"", "json_invalid"),
        (b'{"caption": "\\ud800"}', "caption_not_utf8"),
        (b'{"caption": "\xe9"}', "caption_not_utf8"),
        pytest.param(b"[" * 100_000, "json_invalid", id="nested beyond any stack"),
        pytest.param(b'{"caption": "a", "n": ' + b"9" * 5000 + b"}", "json_invalid", id="5000 digits"),
    ],
)
def test_a_caption_in_the_json_member_is_found_or_its_absence_named(
    tmp_path: Path, content: bytes, expected: str
) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", PICTURE), ("a.txt", b"not this"), ("a.json", content)])
    (entry,) = scan(path, "json:caption")
    assert (entry.reason if isinstance(entry, Reject) else caption_of(entry)) == expected


def test_a_caption_loses_byte_order_mark_and_outer_white_space_and_nothing_else(tmp_path: Path) -> None:
    members = [
        ("a.jpg", PICTURE),
        ("a.txt", "\ufeff  line\r\nnext\x00 \n".encode()),
        ("a.json", b'{"c": " x "}'),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    for caption, expected in (("txt", "line\r\nnext\x00"), ("json:c", "x")):
        (entry,) = scan(path, caption)
        assert caption_of(entry) == expected


def test_a_key_that_comes_twice_is_used_once_and_counted_once(tmp_path: Path) -> None:
    first, second = [("a.jpg", b"1"), ("a.txt", b"one")], [("a.jpg", b"2"), ("a.txt", b"two")]
    path = write_tar(tmp_path / "a.tar", [*first, ("b.jpg", b"3"), ("b.txt", b"b"), *second])
    entries = scan(path)
    assert captions(entries) == {"a": "one", "b": "b"}
    assert reasons(entries) == [("a", "duplicate_key")]


def test_two_pictures_that_differ_in_the_case_of_their_extension_are_a_duplicate(tmp_path: Path) -> None:
    entries = scan(write_tar(tmp_path / "a.tar", [("a.jpg", b"1"), ("a.JPG", b"2"), ("a.txt", b"x")]))
    assert reasons(entries) == [("a", "duplicate_key")]
    assert content(entries[0])[0] == b"1"


def test_hidden_files_folders_and_links_are_not_members(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        folder, link = tarfile.TarInfo("d"), tarfile.TarInfo("d/a.png")
        folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(folder)
        tar.addfile(link)
    with tarfile.open(path, "a") as tar:
        write_tar(
            tmp_path / "b.tar",
            [("d/._a.jpg", b"x"), (".DS_Store", b"x"), ("d/a.jpg", PICTURE), ("d/a.txt", b"x")],
        )
        with tarfile.open(tmp_path / "b.tar") as more:
            for member in more:
                tar.addfile(member, more.extractfile(member))
    (entry,) = scan(path)
    assert entry.key == "d/a" and content(entry)[0] == PICTURE


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_by_offset_equal_tarfiles_own_extraction(tmp_path: Path, format: int) -> None:
    long = "" if format == tarfile.USTAR_FORMAT else "長い/" + "x" * 200
    members = [(f"{long}{n}.{kind}", bytes([n]) * (n * 211)) for n in range(1, 9) for kind in ("jpg", "txt")]
    path = write_tar(tmp_path / "a.tar", members, format)
    found = {}
    for entry in scan(path):
        place = media_of(entry).place
        assert place is not None and place.file == str(path)
        found[f"{entry.key}.jpg"] = read_range(place.file, place.offset, place.size)
        found[f"{entry.key}.txt"] = caption_of(entry).encode()
    with tarfile.open(path) as tar:
        expected = {member.name: file.read() for member in tar if (file := tar.extractfile(member))}
    assert found == expected and len(found) == 16


def test_of_a_picture_the_scan_reads_its_header_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = encode(noise(0, 600, 600), "JPEG", quality=95)
    path = write_tar(tmp_path / "a.tar", [("a.jpg", picture), ("a.txt", b"x")])
    reads = Reads(monkeypatch)
    (entry,) = scan(path)
    assert read_header(picture_of(entry), limits=ImageLimits()) == Header(600, 600)
    assert reads.bytes <= 2 * 8192 + 512 < len(picture) // 10


def test_a_member_beyond_the_limit_is_refused_by_its_size_and_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.tar"
    huge = tarfile.TarInfo("a.jpg")
    huge.size = 5 << 30  # a hole in the file
    caption = tarfile.TarInfo("b.txt")
    caption.size = MAX_CAPTION_BYTES + 1
    with path.open("wb") as file:
        file.write(huge.tobuf())
        file.truncate(512 + huge.size)
    rest = [("a.txt", b"x"), ("b.jpg", PICTURE), ("b.txt", b"x" * caption.size)]
    with path.open("ab") as file:
        file.write(write_tar(tmp_path / "rest.tar", rest).read_bytes())
    reads = Reads(monkeypatch)
    first, second = scan(path)
    file = picture_of(first)
    with pytest.raises(ImageError, match=r"5368709120 bytes, limit 67108864") as caught:
        read_header(file, limits=ImageLimits())
    assert caught.value.reason == "image_too_many_bytes"
    assert isinstance(second, Reject) and second.reason == "caption_too_many_bytes"
    assert reads.bytes == 1  # a caption of one byte


def test_a_file_that_shrinks_under_the_scan_is_an_error_of_the_system_and_no_broken_picture(
    tmp_path: Path,
) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"x"), ("a.jpg", png(9, 9))])
    (entry,) = scan(path)
    file = picture_of(entry)
    os.truncate(path, 1600)  # header, caption, header, and 64 bytes of the picture
    with pytest.raises(OSError, match="shorter than when its headers were read") as caught:
        read_header(file, limits=ImageLimits())
    assert str(caught.value.filename) == str(path)


# By hand from odd_samples.expect.json. What it leaves to policy is decided by the rules of the source.
ODD_REJECTS = [
    ("a001", "no_caption"),
    ("a002", "no_image"),
    ("a004", "caption_not_utf8"),
    ("a005", "caption_not_utf8"),
    ("a006", "caption_empty"),
    ("a007", "caption_empty"),
    ("README", "no_image"),
    ("a023", "no_image"),  # a symbolic link
    ("a024", "no_image"),  # a hard link
    ("a033", "caption_not_utf8"),
    ("a016", "duplicate_key"),
]


def test_the_odd_samples_are_usable_or_rejected_as_their_list_says(shared_data: Path) -> None:
    directory = shared_data / "hostile" / "tars"
    listed = {e["key"]: e["usable"] for e in json.loads((directory / "odd_samples.expect.json").read_text())}
    entries = scan(directory / "odd_samples_pax.tar")
    assert reasons(entries) == ODD_REJECTS
    usable = {
        f"long/…_{key[-4:]}" if key.startswith("long/") else key: text
        for key, text in captions(entries).items()
    }
    assert set(usable) == set(listed) - {key for key, _ in ODD_REJECTS} | {"a016"}
    # A broken picture is found when its header is read or its pixels are decoded, not here.
    assert {key for key in usable if listed[key] is False} == {"a012", "a013", "a014"}
    assert {key for key in listed if listed[key] is True} <= set(usable)
    assert usable["a010"] == "<|image|>" and "\x00" in usable["a008"]
    assert not usable["a030"].startswith("\ufeff")
    assert len(usable["a011"]) > 40_000


def test_pax_and_gnu_names_give_the_same_samples(shared_data: Path) -> None:
    directory = shared_data / "hostile" / "tars"
    gnu = captions(scan(directory / "odd_samples_gnu.tar"))
    pax = captions(scan(directory / "odd_samples_pax.tar"))
    assert len(gnu) == 9 and gnu.items() <= pax.items()
    assert any(len(key) > 300 for key in gnu) and "写真/猫 a027" in gnu and "../a025" in gnu


@pytest.mark.parametrize(
    ("name", "usable", "rest"),
    [
        ("good6.tar", 6, 0),
        ("no_end_blocks.tar", 6, 0),
        ("trailing_garbage.tar", 6, 0),
        ("concatenated.tar", 6, 1),
        ("only_end_blocks.tar", 0, 0),
        ("truncated_mid_member.tar", 4, 1),
        ("bad_header_checksum.tar", 2, 1),
        ("bad_size_field.tar", 2, 1),
    ],
)
def test_what_stands_before_the_damage_is_usable_and_the_rest_is_one_reject(
    shared_data: Path, name: str, usable: int, rest: int
) -> None:
    entries = scan(shared_data / "hostile" / "tars" / name)
    found = captions(entries)
    assert len(found) == usable
    assert found.items() <= captions(scan(shared_data / "hostile" / "tars" / "good6.tar")).items()
    assert reasons(entries) == [(f"{name}#rest", "archive_damaged")] * rest


def test_a_tar_cut_at_any_byte_loses_no_whole_sample_and_says_that_it_is_cut(tmp_path: Path) -> None:
    members = [(f"{n}.{kind}", bytes([65 + n]) * 100) for n in range(3) for kind in ("jpg", "txt")]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    # A member is a header of 512 bytes and its content in one block of 512: member i ends at 1024 * i + 612.
    for cut in (700, 1024, 1100, 1536, 1600, 2048, 2049, 3000, 4096, 5000, 6144, 6200):
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:cut])
        whole_members = (cut + 412) // 1024
        entries = scan(path)
        assert len(captions(entries)) == whole_members // 2, cut
        at_a_border = cut % 1024 == 0 or cut > 6144  # nothing after a whole member, or zeros
        assert [reason for _, reason in reasons(entries)].count("archive_damaged") == (not at_a_border), cut


def test_a_header_that_leads_back_to_itself_ends_the_walk(tmp_path: Path) -> None:
    good = tarfile.TarInfo("a.jpg")
    good.size = 512
    loop = bytearray(tarfile.TarInfo("b.jpg").tobuf(tarfile.GNU_FORMAT))
    loop[124:136] = (-1536 % 2**96).to_bytes(12, "big")  # its end lies at byte 0
    loop[148:156] = b"%06o\0 " % (256 + sum(loop[:148]) + sum(loop[156:]))
    path = tmp_path / "a.tar"
    path.write_bytes(good.tobuf(tarfile.GNU_FORMAT) + b"x" * 512 + bytes(loop) + b"\0" * 1024)
    assert ("a.tar#rest", "archive_damaged") in reasons(scan(path))


@pytest.mark.parametrize("name", ["not_a_tar.tar", "empty.tar"])
def test_what_is_no_tar_is_refused_in_one_line_that_names_the_file(shared_data: Path, name: str) -> None:
    path = shared_data / "hostile" / "tars" / name
    with pytest.raises(UserError) as caught:
        scan(path)
    message = str(caught.value)
    assert str(path) in message and "sources.web.paths" in message and "\n" not in message
