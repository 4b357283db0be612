"""Tars packed with gzip or zstd: what a stream gives equals what the plain tar gives, whole or damaged."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preprocess.job import run_job
from preprocess.samples import Media, Missing, RawSample, Reject
from preprocess.sources import tars
from preprocess.sources.base import BadFileError, SourceContext
from preprocess.sources.tar_headers import plain_member
from preprocess.sources.tars import WINDOW_KEYS, walk_plain
from preprocess.sources.webdataset import WebDataset, WebDatasetConfig
from shared.files import read_json
from shared.tokens import TokenNames
from tests.preprocess.inputs import (
    Members,
    captioned,
    make_config,
    mixed_samples,
    png,
    write_samples,
    write_tar,
)

PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, 1),
    "zstd": lambda data: zstandard.compress(data, 1),
}
CONTEXT = SourceContext("web", Path("unused"), TokenNames(), max_media_bytes=1 << 20)

Content = tuple[bytes, str]


def scan(path: Path) -> list[RawSample | Reject]:
    return list(WebDataset(WebDatasetConfig(paths=(str(path),)), CONTEXT).scan(str(path)))


def contents(entries: list[RawSample | Reject]) -> dict[str, Content]:
    """Picture and caption of every sample by key, in order."""
    found: dict[str, Content] = {}
    for entry in entries:
        if isinstance(entry, RawSample):
            picture, caption = entry.segments
            assert isinstance(picture, Media)
            picture.file.seek(0)
            found[entry.key] = (picture.file.read(), caption.text)  # type: ignore[union-attr]
    return found


def reasons(entries: list[RawSample | Reject]) -> Counter[tuple[str, str]]:
    return Counter((entry.key, entry.reason) for entry in entries if isinstance(entry, Reject))


def packed(path: Path, data: bytes, codec: str) -> Path:
    path.write_bytes(PACK[codec](data))
    return path


names = st.builds(
    "{}{}.{}".format,
    st.sampled_from(["", "d/", "./"]),
    st.sampled_from("abc"),
    st.sampled_from(["jpg", "JPG", "txt", "json", "png", "d.x"]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    members=st.lists(st.tuples(names, st.sampled_from([b"", b"x", b"7" * 700, b"\xff"])), max_size=12),
    format=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_a_stream_gives_the_samples_and_rejects_of_the_plain_tar(
    tmp_path: Path, members: Members, format: int
) -> None:
    plain = write_tar(tmp_path / "a.tar", members, format)
    expected = scan(plain)
    for codec in PACK:
        found = scan(packed(tmp_path / "b.tar", plain.read_bytes(), codec))
        assert list(contents(found).items()) == list(contents(expected).items())
        assert reasons(found) == reasons(expected)


@pytest.mark.parametrize("codec", PACK)
def test_a_job_over_packed_tars_writes_the_shards_of_one_over_plain_tars(tmp_path: Path, codec: str) -> None:
    (tmp_path / "packed").mkdir()
    paths: list[Path] = []
    for number in range(2):
        path = write_samples(tmp_path / f"{number}.tar", mixed_samples(20, number, f"{number}-"))
        paths.append(packed(tmp_path / "packed" / path.name, path.read_bytes(), codec))
    plain = make_config(tmp_path / "plain", tmp_path / "0.tar", tmp_path / "1.tar")
    stream = make_config(tmp_path / "stream", *paths)
    for config in (plain, stream):
        run_job(config)
    manifests = [read_json(Path(config.output) / "dataset.json") for config in (plain, stream)]
    assert manifests[0] == manifests[1] and len(manifests[0]["shards"]) > 1  # checksums too


def test_the_real_tar_under_a_gzip_stream_is_read(shared_data: Path) -> None:
    directory = shared_data / "hostile" / "tars"
    entries = scan(directory / "gzipped.tar")
    assert contents(entries) == contents(scan(directory / "good6.tar"))
    assert len(entries) == 6


def test_all_hostile_tars_go_through_one_job_and_the_account_says_what_each_cost(
    tmp_path: Path, shared_data: Path
) -> None:
    tars = sorted((shared_data / "hostile" / "tars").glob("*.tar"))
    assert len(tars) == 13
    config = make_config(tmp_path, *tars, source={"bad_file": "reject"})
    run_job(config)
    line = read_json(Path(config.output) / "dataset.json")["account"]["web"]
    assert line["read"] == line["packed"] + line["split_parts"] + sum(line["rejected"].values())
    # Rests of truncated_mid_member, bad_header_checksum, bad_size_field and concatenated.
    assert line["rejected"]["archive_damaged"] == 4
    assert line["rejected"]["file_unreadable"] == 2  # empty, not_a_tar


@pytest.mark.parametrize("codec", PACK)
def test_a_stream_cut_anywhere_keeps_the_samples_before_the_cut_and_says_that_it_is_cut(
    tmp_path: Path, codec: str
) -> None:
    rng = random.Random(0)
    members = [m for n in range(12) for m in captioned(f"{n:02d}", rng.randbytes(1000), f"caption {n}")]
    plain = write_tar(tmp_path / "a.tar", members).read_bytes()
    whole = PACK[codec](plain)
    for cut in (*range(0, len(whole), len(whole) // 12), len(whole) - 9, len(whole) - 1):
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:cut])
        available = unpacked_bytes(whole[:cut], codec)
        if available < 512:
            with pytest.raises(BadFileError, match="not a readable tar"):
                scan(path)
            continue
        entries = scan(path)
        # A sample is a header, 1000 bytes in two blocks, a header and a block: 2560 bytes in all.
        assert len(contents(entries)) >= min(12, (available - 512) // 2560), cut
        assert reasons(entries)["cut.tar#rest", "archive_damaged"] == 1, cut


def unpacked_bytes(data: bytes, codec: str) -> int:
    """How much another library gets out of the beginning of a stream."""
    if codec == "zstd":
        return len(zstandard.ZstdDecompressor().decompressobj().decompress(data))
    import zlib

    return len(zlib.decompressobj(31).decompress(data))


@pytest.mark.parametrize("codec", PACK)
def test_a_bit_flipped_inside_the_stream_is_damage_and_what_stands_before_it_is_kept(
    tmp_path: Path, codec: str
) -> None:
    members = [m for n in range(300) for m in captioned(f"{n:03d}", random.Random(n).randbytes(900), "x")]
    data = bytearray(PACK[codec](write_tar(tmp_path / "a.tar", members).read_bytes()))
    # The header of a block far behind the beginning: the first blocks are whole.
    data[len(data) * 3 // 4 : len(data) * 3 // 4 + 4000] = bytes(4000)
    path = tmp_path / "b.tar"
    path.write_bytes(data)
    entries = scan(path)
    assert 50 < len(contents(entries)) < 300
    assert contents(entries).items() <= contents(scan(tmp_path / "a.tar")).items()
    assert reasons(entries)["b.tar#rest", "archive_damaged"] == 1


def test_streams_one_behind_another_are_one_stream(tmp_path: Path) -> None:
    plain = write_tar(tmp_path / "a.tar", captioned("a", b"p" * 5000, "x")).read_bytes()
    for codec, pack in PACK.items():
        path = tmp_path / f"{codec}.tar"
        path.write_bytes(pack(plain[:1500]) + pack(plain[1500:4000]) + pack(plain[4000:]))
        assert contents(scan(path)) == {"a": (b"p" * 5000, "x")}


def test_an_archive_behind_the_end_of_a_stream_is_reported_and_other_bytes_are_not(tmp_path: Path) -> None:
    plain = write_tar(tmp_path / "a.tar", captioned("a", b"p", "x")).read_bytes()
    for behind, damaged in ((plain, 1), (b"no tar " * 300, 0), (bytes(5000), 0)):
        entries = scan(packed(tmp_path / "b.tar", plain + behind, "gzip"))
        assert list(contents(entries)) == ["a"]
        assert reasons(entries).total() == damaged


def test_a_stream_is_checked_to_its_end_also_where_other_bytes_follow_the_archive(tmp_path: Path) -> None:
    plain = write_tar(tmp_path / "a.tar", captioned("a", b"p", "x")).read_bytes()
    data = bytearray(gzip.compress(plain + b"no tar " * 100_000))
    data[-8] ^= 1  # its checksum
    (tmp_path / "b.tar").write_bytes(data)
    entries = scan(tmp_path / "b.tar")
    assert list(contents(entries)) == ["a"]
    assert reasons(entries) == {("b.tar#rest", "archive_damaged"): 1}


def test_members_of_a_key_further_apart_than_the_window_are_rejected_and_nearer_ones_are_not(
    tmp_path: Path,
) -> None:
    def between(count: int) -> Members:
        return [m for n in range(count) for m in captioned(f"n{n:03d}", b"p", "x")]

    near = [("a.txt", b"far"), *between(WINDOW_KEYS), ("a.png", b"q")]
    entries = scan(packed(tmp_path / "b.tar", write_tar(tmp_path / "a.tar", near).read_bytes(), "zstd"))
    assert contents(entries)["a"] == (b"q", "far") and not reasons(entries)

    far = [("a.txt", b"far"), *between(WINDOW_KEYS + 1), ("a.png", b"q"), *captioned("n000", b"2", "y")]
    entries = scan(packed(tmp_path / "b.tar", write_tar(tmp_path / "a.tar", far).read_bytes(), "zstd"))
    assert len(contents(entries)) == WINDOW_KEYS + 1
    assert reasons(entries) == {("a", "no_image"): 1, ("a", "members_apart"): 1, ("n000", "duplicate_key"): 1}
    assert contents(entries)["n000"] == (b"p", "x")  # the first of the two


def test_the_window_closes_early_when_more_bytes_wait_than_it_may_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tars, "WINDOW_BYTES", 2500)
    pictures = [(f"{key}.png", key.encode() * 1000) for key in "abcd"]
    captions = [(f"{key}.txt", b"x") for key in "abcd"]
    plain = write_tar(tmp_path / "a.tar", [*pictures, *captions]).read_bytes()
    entries = scan(packed(tmp_path / "b.tar", plain, "zstd"))
    # a goes when c comes, b when d comes: 2000 bytes wait at most. c and d get their captions.
    assert list(contents(entries)) == ["c", "d"]
    assert reasons(entries) == {
        (key, reason): 1 for key in "ab" for reason in ("no_caption", "members_apart")
    }


def test_a_giant_member_is_read_past_in_little_memory(tmp_path: Path) -> None:
    giant = tarfile.TarInfo("a.png")
    giant.size = 256 << 20
    rest = write_tar(tmp_path / "rest.tar", [("a.txt", b"x"), *captioned("b", b"p", "y")]).read_bytes()
    block = bytes(1 << 20)
    path = tmp_path / "a.tar.zst"
    with path.open("wb") as file, zstandard.ZstdCompressor(1).stream_writer(file) as stream:
        stream.write(giant.tobuf())
        for _ in range(giant.size >> 20):
            stream.write(block)
        stream.write(rest)
    assert path.stat().st_size < 200_000
    tracemalloc.start()
    first, second = scan(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(first, RawSample)
    assert first.segments[0] == Missing("image_too_many_bytes", f"{256 << 20} bytes, limit {1 << 20}")
    assert isinstance(second, RawSample) and second.key == "b"
    assert peak < 8 << 20


@pytest.mark.parametrize("codec", PACK)
def test_a_stream_that_holds_no_tar_is_refused_by_name(tmp_path: Path, codec: str) -> None:
    for data in (b"", b"text " * 1000):
        with pytest.raises(BadFileError, match=r"b\.tar: not a readable tar"):
            scan(packed(tmp_path / "b.tar", data, codec))


# Mutated tars


def seeds() -> list[bytes]:
    """Small tars of all formats, with long names, odd members and two samples that must survive elsewhere."""
    found: list[bytes] = []
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
            long = "" if format == tarfile.USTAR_FORMAT else "長い/" + "n" * 120
            for name, data in (
                *captioned("a", png(8, 8), "cat"),
                (f"{long}.txt", b"t"),
                (f"{long}.jpg", b"j"),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            link = tarfile.TarInfo("l.png")
            link.type, link.linkname = tarfile.SYMTYPE, "a.png"
            tar.addfile(link)
        found.append(buffer.getvalue()[:8192])
    return found


SEEDS = seeds()
Edit = tuple[int, int, bytes]  # at, how many bytes go, what comes
edits = st.lists(
    st.tuples(st.integers(0, 8191), st.sampled_from([0, 1, 1, 4, 12, 512]), st.binary(max_size=12)),
    max_size=4,
)
# Where the headers' type, size and checksum stand: most edits elsewhere only change a name.
aimed = st.lists(
    st.tuples(
        st.builds(
            lambda block, byte: 512 * block + byte,
            st.integers(0, 15),
            st.sampled_from([0, 100, 124, 130, 135, 156, 257, 345, 386, 482]),
        ),
        st.sampled_from([1, 12]),
        st.sampled_from(
            [
                b"x",
                b"L",
                b"S",
                b"g",
                b"K",
                b"1",
                b"\x80" + bytes(11),
                b"\xff" * 12,
                b"77777777777\0",
                b"00000000000\0",
                b"12 GNU.sparse",
            ]
        ),
    ),
    max_size=3,
)


def mend_checksums(data: bytearray) -> None:
    """Make every block that looks like a header a valid one, so that edits reach what lies behind the checksum."""
    for start in range(0, len(data) - 511, 512):
        block = data[start : start + 512]
        if block[257:262] == b"ustar":
            data[start + 148 : start + 156] = b"%06o\0 " % (256 + sum(block[:148]) + sum(block[156:]))


def check_mutant(
    path: Path, seed: int, changes: list[Edit], mend: bool, codec: str, tail: list[Edit]
) -> None:
    data = bytearray(SEEDS[seed])
    for at, gone, new in changes:
        data[at : at + gone] = new
    if mend:
        mend_checksums(data)
    if codec:
        data = bytearray(PACK[codec](bytes(data)))
        for at, gone, new in tail:
            at %= len(data) + 1
            data[at : at + gone] = new
    path.write_bytes(data)
    try:
        entries = scan(path)
    except BadFileError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    keys = Counter(entry.key for entry in entries if isinstance(entry, RawSample))
    assert not keys or max(keys.values()) == 1, "a key is used once"
    for entry in entries:
        if isinstance(entry, RawSample):
            picture = entry.segments[0]
            assert isinstance(picture, (Media, Missing))
            if isinstance(picture, Media):
                size = picture.file.seek(0, io.SEEK_END)
                picture.file.seek(0)
                assert len(picture.file.read()) == size
    # Damage is told once.
    assert sum(count for (_, reason), count in reasons(entries).items() if reason == "archive_damaged") <= 1


mutants = given(
    seed=st.integers(0, len(SEEDS) - 1),
    changes=edits | aimed,
    mend=st.booleans(),
    codec=st.sampled_from(["", "", "gzip", "zstd"]),
    tail=st.just([]) | edits,
)
fuzz = settings(deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(fuzz, max_examples=150)
@mutants
def test_a_mutated_tar_neither_crashes_nor_hangs_the_scan(
    tmp_path: Path, seed: int, changes: list[Edit], mend: bool, codec: str, tail: list[Edit]
) -> None:
    check_mutant(tmp_path / "m.tar", seed, changes, mend, codec, tail)


@pytest.mark.slow
@settings(fuzz, max_examples=15_000)
@mutants
def test_many_mutated_tars_neither_crash_nor_hang_the_scan(
    tmp_path: Path, seed: int, changes: list[Edit], mend: bool, codec: str, tail: list[Edit]
) -> None:
    check_mutant(tmp_path / "m.tar", seed, changes, mend, codec, tail)


def test_a_plain_tar_is_listed_key_by_key_wherever_its_members_stand(tmp_path: Path) -> None:
    names = ["b.jpg", "a.jpg", "b.txt", "c.txt", "b.JPG", "a.txt", "b.txt", "c.txt", "b.txt"]
    path = write_tar(tmp_path / "a.tar", [(name, name.encode()) for name in names])
    groups, damage = walk_plain(str(path), str(path))
    # Each member is a header and a block.
    place = {offset: number for number, offset in enumerate(range(512, 1024 * len(names), 1024))}
    found = [(g.key, g.fault, {name: place[m.offset] for name, m in g.members.items()}) for g in groups]
    assert damage == ""
    assert found == [
        ("b", "", {"jpg": 0, "txt": 2}),
        ("a", "", {"jpg": 1, "txt": 5}),
        ("c", "", {"txt": 3}),
        ("b", "repeated", {"jpg": 4, "txt": 6}),
        ("c", "repeated", {"txt": 7}),
        ("b", "repeated", {"txt": 8}),
    ]


def test_a_plain_tar_of_many_members_takes_little_memory(tmp_path: Path) -> None:
    count = 10_000
    names = [f"part/{number:09d}.{kind}" for number in range(count) for kind in ("jpg", "txt")]
    path = write_tar(tmp_path / "a.tar", [(name, b"") for name in names])
    tracemalloc.start()
    groups, _ = walk_plain(str(path), str(path))
    assert sum(1 for _ in groups) == count
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Two members of 36 bytes and a key of 14, what arrays grow by and the order; 800 as objects.
    assert peak / count < 250


Walked = tuple[list[tuple[str, str, dict[str, tuple[int, int]]]], str] | str


def walk(path: Path) -> Walked:
    """All groups with the places of their members, and the damage; or why it is no tar."""
    try:
        groups, damage = walk_plain(str(path), str(path))
    except BadFileError as error:
        return str(error)
    places = [
        (group.key, group.fault, {kind: (m.offset, m.size) for kind, m in group.members.items()})
        for group in groups
    ]
    return places, damage


def walk_by_tarfile(path: Path) -> Walked:
    """The same without the short way for plain headers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tars, "_list_plain", lambda *_: None)
        return walk(path)


@settings(fuzz, max_examples=300)
@given(seed=st.integers(0, len(SEEDS) - 1), changes=edits | aimed, mend=st.booleans())
def test_the_short_way_for_plain_headers_lists_what_tarfile_lists_and_faults_where_it_does(
    tmp_path: Path, seed: int, changes: list[Edit], mend: bool
) -> None:
    data = bytearray(SEEDS[seed])
    for at, gone, new in changes:
        data[at : at + gone] = new
    if mend:
        mend_checksums(data)
    path = tmp_path / "m.tar"
    path.write_bytes(data)
    assert walk(path) == walk_by_tarfile(path)


def test_the_short_way_lists_real_and_hostile_tars_as_tarfile_does(shared_data: Path) -> None:
    for path in sorted(shared_data.rglob("*.tar")):
        assert walk(path) == walk_by_tarfile(path), path


def test_a_tar_cut_at_any_byte_is_faulted_as_tarfile_faults_it(tmp_path: Path) -> None:
    members = [("a.jpg", b"p" * 700), ("a.txt", b""), ("b.jpg", b"q" * 512), ("b.txt", b"x")]
    whole = write_tar(tmp_path / "a.tar", members, tarfile.USTAR_FORMAT).read_bytes()
    for cut in range(512, len(whole), 59):
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:cut])
        assert walk(path) == walk_by_tarfile(path), cut


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_headers_of_regular_files_go_the_short_way_and_those_of_a_wrong_sum_do_not(
    format: Literal[0, 1],
) -> None:
    member = tarfile.TarInfo("folder/" + "n" * 60 + "/a.jpg" if format == tarfile.USTAR_FORMAT else "é.jpg")
    member.size, member.mtime, member.uid, member.uname = 0o1234567, 1 << 32, 1000, "\xff" * 10
    header = member.tobuf(format)
    assert plain_member(header) == (member.name, member.size)
    for at in (0, 99, 257, 499, 511):
        assert plain_member(header[:at] + bytes([header[at] ^ 1]) + header[at + 1 :]) is None
    assert plain_member(b"\xff" * 512) is None and plain_member(header[:511]) is None


def test_what_a_global_record_says_of_all_members_is_not_lost_on_plain_headers(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    named = {"path": "k.jpg"}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers=named) as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("a.jpg"))
    walked = walk(path)
    assert walked == walk_by_tarfile(path)
    assert [key for key, *_ in walked[0]] == ["k", "k"]
