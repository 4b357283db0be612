"""The scan: what a source yields becomes tokens, places and rejects, in batches of whatever size."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preprocess import scan
from preprocess.faults import Limits, supervise
from preprocess.index import IndexedUnit, media_file, read_counts, token_file
from preprocess.samples import IMAGE, STORE, TEXT, Media, Missing, RawSample, Reject, Segment, Text
from preprocess.scan import ScanUnit, scan_unit
from shared.tables import read_table
from tests.preprocess.inputs import make_config, mixed_samples, png, write_samples

Entry = RawSample | Reject


def code(letter: str) -> int:
    """The id of a printable byte: the vocabulary begins with "!"."""
    return ord(letter) - ord("!")


class Listed:
    """A source of given entries."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries = entries

    def units(self) -> list[str]:
        return ["a"]

    def scan(self, unit: str) -> Iterator[Entry]:
        return iter(self._entries)


def picture(data: bytes) -> Media:
    return Media(IMAGE, io.BytesIO(data), None)


class Scanned:
    """What one scan left behind, read back."""

    def __init__(self, path: Path) -> None:
        self.rows = {row["key"]: row for row in read_table(path, mend="").to_pylist()}
        self.tokens = np.fromfile(token_file(path), "<i4")
        self.media = media_file(path).read_bytes() if media_file(path).exists() else b""
        rejects = IndexedUnit("web", "a", path).rejects
        rows = read_table(rejects, mend="").to_pylist() if rejects.exists() else []
        self.rejects = [Reject(**row) for row in rows]
        self.counts = read_counts(path)
        self.files = {p.name: p.read_bytes() for p in path.parent.iterdir()}

    def texts(self, key: str) -> list[list[int]]:
        segments = [s for s in self.rows[key]["segments"] if s["kind"] == TEXT]
        return [self.tokens[s["offset"] : s["offset"] + s["tokens"]].tolist() for s in segments]

    def kinds(self, key: str) -> list[int]:
        return [segment["kind"] for segment in self.rows[key]["segments"]]


class Slow(io.BytesIO):
    """A picture in a store that stalls."""

    def read(self, size: int | None = -1, /) -> bytes:
        time.sleep(1.5)
        return super().read(size)


def scan_slow_pictures(task: ScanUnit) -> dict[str, Any]:
    """For a process of its own."""
    entries = [sample(f"{n}", Media(IMAGE, Slow(png(8, 8)), None)) for n in range(2)]
    scan.open_source = lambda config, context: Listed(entries)
    return scan_unit(task)


def run(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    entries: Sequence[Entry],
    bad_media: str = "reject",
    crashed: dict[int, str] | None = None,
) -> Scanned:
    monkeypatch.setattr(scan, "open_source", lambda config, context: Listed(entries))
    task = unit(directory, bad_media, crashed)
    scan_unit(task)
    return Scanned(task.output)


def unit(directory: Path, bad_media: str = "reject", crashed: dict[int, str] | None = None) -> ScanUnit:
    config = make_config(
        directory,
        write_samples(directory / "unused.tar", {"a": (png(8, 8), "x")}),
        source={"bad_media": bad_media},
    )
    return ScanUnit(
        source="web",
        config=config.sources["web"],
        unit="a",
        output=directory / "index" / "000000.parquet",
        tokenizer=Path(config.tokenizer),
        tokens=config.tokens,
        geometry=config.geometry,
        limits=config.limits,
        video=config.video,
        hash_content=True,
        crashed=crashed,
    )


def sample(key: str, *segments: Segment, separator: str = "") -> RawSample:
    return RawSample(key, segments, separator)


def test_plain_texts_that_nothing_separates_become_one_and_marked_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [
        sample("plain", Text("ab"), Text("c"), separator="-"),
        sample("marked", Text("ab", learned=()), Text("c"), Text("d"), separator="-"),
        sample("behind", Text("ab"), Text("c", learned=((0, 1),)), separator="-"),
    ]
    found = run(tmp_path, monkeypatch, entries)
    a, b, c, d, dash = (code(letter) for letter in "abcd-")
    assert found.texts("plain") == [[a, b, dash, c]]
    assert found.texts("marked") == [[~a, ~b], [c, dash, d]]
    assert found.texts("behind") == [[a, b], [c]]


def test_a_picture_without_a_place_is_kept_in_the_store_and_one_that_is_dropped_joins_its_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = png(8, 8), png(16, 8)
    entries = [
        sample("a", Text("x"), Missing("image_missing", "no file"), Text("y"), picture(first), separator="+"),
        sample("b", picture(second), picture(b"<html>")),
    ]
    found = run(tmp_path, monkeypatch, entries, bad_media="drop")
    assert found.texts("a") == [[code("x"), code("+"), code("y")]] and found.kinds("a") == [TEXT, IMAGE]
    places = [s for key in "ab" for s in found.rows[key]["segments"] if s["kind"] == IMAGE]
    assert [s["file"] for s in places] == [STORE, STORE]
    assert [found.media[s["offset"] : s["offset"] + s["size"]] for s in places] == [first, second]
    assert [(r.key, r.reason, r.media) for r in found.rejects] == [
        ("a", "image_missing", 0),
        ("b", "image_unreadable", 1),
    ]
    assert found.counts["media_dropped"] == {"image_missing": 1, "image_unreadable": 1}
    assert (found.counts["read"], found.counts["samples"], found.counts["rejected"]) == (2, 2, {})


def test_where_a_bad_picture_costs_the_sample_nothing_of_it_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [sample("a", Text("x"), picture(b"<html>")), sample("b", Text("y"))]
    found = run(tmp_path, monkeypatch, entries)
    assert list(found.rows) == ["b"] and found.texts("b") == [[code("y")]]
    assert found.counts["rejected"] == {"image_unreadable": 1} and found.counts["media_dropped"] == {}


def test_a_document_that_loses_all_it_has_is_rejected_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(tmp_path, monkeypatch, [sample("a", picture(b"<html>"))], bad_media="drop")
    assert found.rows == {}
    assert found.counts["read"] == 1 and sum(found.counts["rejected"].values()) == 1


def test_the_same_content_has_the_same_hash_and_other_content_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [
        sample("a", picture(png(8, 8)), Text("x")),
        sample("b", picture(png(8, 8)), Text("x")),
        sample("c", picture(png(8, 8, 1)), Text("x")),
        sample("d", picture(png(8, 8)), Text("y")),
        sample("e", Text("x"), picture(png(8, 8))),
    ]
    rows = run(tmp_path, monkeypatch, entries).rows
    hashes = [rows[key]["content_hash"] for key in "abcde"]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 4
    assert len({rows[key]["key_hash"] for key in "abcde"}) == 5


def test_the_hash_tells_how_texts_are_cut_whose_they_are_and_what_is_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    see, book = Text("see "), Text("book")
    entries = [
        sample("a", see, book),
        sample("as one", Text("see book")),
        sample("with its word", Text("see textbook")),
        sample("marked", Text("see book", learned=())),
        sample("partly", Text("see book", learned=((4, 8),))),
        sample("within", Text("see book", learned=(), inner=True)),
        sample("special", Text("<|pad|>", special=((0, 7),))),
        sample("the same, dropped", see, Missing("image_missing", "no file"), book),
    ]
    rows = run(tmp_path, monkeypatch, entries, bad_media="drop").rows
    hashes = {key: row["content_hash"] for key, row in rows.items()}
    assert hashes["a"] == hashes["as one"] == hashes["the same, dropped"]
    assert len(hashes) == 8 and len(set(hashes.values())) == 6


def test_how_long_a_text_may_be_is_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "open_source", lambda config, context: Listed(entries))
    entries = [sample("a", Text("x" * 20)), sample("b", Text("x" * 21))]
    for most, reasons in ((20, {"text_too_many_bytes": 1}), (21, {})):
        task = unit(tmp_path)
        task = replace(task, limits=replace(task.limits, max_text_bytes=most))
        assert scan_unit(task)["rejected"] == reasons


def test_many_texts_cost_what_one_of_their_length_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = time.process_time()
    found = run(tmp_path, monkeypatch, [sample("a", *[Text("x" * 99)] * 80_000, separator="-")])
    # Half a minute where each is copied with all before it.
    assert time.process_time() - begun < 5
    assert [r.detail for r in found.rejects] == [
        f"{80_000 * 100 - 1} bytes, limit {4 << 20} (limits.max_text_bytes)"
    ]


@pytest.mark.parametrize(("size", "crashed"), [(1, None), (2, None), (7, None), (1000, {})])
def test_the_files_of_the_index_do_not_depend_on_the_batch_or_on_supervision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, crashed: dict[int, str] | None
) -> None:
    entries: list[Entry] = []
    for number, (data, caption) in enumerate(mixed_samples(12).values()):
        entries.append(sample(f"{number}", picture(data), Text(caption)))
        if number % 5 == 0:
            entries.append(Reject("web", f"bad {number}", "no_caption", "none"))
    whole = run(tmp_path / "whole", monkeypatch, entries)
    for entry in entries:
        if isinstance(entry, RawSample):
            for segment in entry.segments:
                if isinstance(segment, Media):
                    segment.file.seek(0)
    monkeypatch.setattr(scan, "BATCH_SAMPLES", size)
    assert run(tmp_path / "parts", monkeypatch, entries, crashed=crashed).files == whole.files


def test_the_time_that_bytes_take_to_arrive_is_not_counted_as_work_on_a_picture(tmp_path: Path) -> None:
    counts = supervise(scan_slow_pictures, unit(tmp_path), Limits(seconds=1.0, memory=2 << 30))
    assert (counts["samples"], counts["rejected"]) == (2, {})


def test_what_crashed_a_worker_is_left_out_and_behind_a_record_that_cannot_be_drawn_nothing_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [sample(key, Text(key)) for key in "abcd"]
    # Entry n is drawn as item 2 n and worked on as item 2 n + 1.
    found = run(tmp_path, monkeypatch, entries, crashed={3: "why", 6: "how"})
    assert list(found.rows) == ["a", "c"]
    assert [(r.key, r.reason, r.detail) for r in found.rejects] == [
        ("b", "crashed", "why"),
        ("a#rest", "crashed", "how"),
    ]
