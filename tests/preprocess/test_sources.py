"""Texts, interleaved documents and tables of captions: what a sample is, what is lost, and that all of it is packed."""

from __future__ import annotations

import base64
import gzip
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from preprocess.job import run_job
from preprocess.samples import Media, Missing, RawSample, Reject, Text
from preprocess.sources import AnySource, open_source
from preprocess.sources.base import SourceContext
from preprocess.sources.captions import CaptionsConfig
from preprocess.sources.interleaved import InterleavedConfig
from preprocess.sources.text import TextConfig
from preprocess.sources.webdataset import WebDatasetConfig
from preprocess.verify import verify_dataset
from shared.errors import UserError
from shared.tokens import TokenNames
from tests.preprocess.inputs import captioned, make_config, png, write_tar
from tests.preprocess.reference import Reference, Segments

Outline = list[tuple[str, Any]]


def scan(config: AnySource) -> list[RawSample | Reject]:
    source = open_source(config, SourceContext("web", Path("unused"), TokenNames()))
    return [entry for unit in source.units() for entry in source.scan(unit)]


def outline(entries: list[RawSample | Reject]) -> Outline:
    """Key and texts, pictures or reasons."""

    def plain(segment: Text | Media | Missing) -> str | bytes | tuple[str]:
        if isinstance(segment, Text):
            return segment.text
        return segment.file.read() if isinstance(segment, Media) else (segment.reason,)

    return [
        (entry.key, entry.reason if isinstance(entry, Reject) else [plain(s) for s in entry.segments])
        for entry in entries
    ]


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def run(
    directory: Path, source: AnySource, samples: Mapping[str, Segments], **changes: Any
) -> dict[str, Any]:
    """Preprocess one source, hold every pack against the reference's samples, and return the account."""
    config = make_config(directory, directory, sources={"web": source}, **changes)
    stats = run_job(config)
    output = Path(config.output)
    found = Reference(output).check({("web", key): segments for key, segments in samples.items()})
    assert {key for _, key in found} == set(samples)
    assert verify_dataset(output)[1] == []
    return stats["account"]["web"]


def rejects(directory: Path) -> dict[str, str]:
    return {
        row["key"]: row["reason"] for row in pq.read_table(directory / "out" / "rejects.parquet").to_pylist()
    }


# Texts


def test_texts_come_from_fields_columns_and_whole_files(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": "one", "id": 1}, {"text": " two\n", "id": 2}])
    pq.write_table(pa.table({"id": ["p"], "text": ["three"], "more": [1]}), tmp_path / "b.parquet")
    config = TextConfig(paths=(str(tmp_path / "a.jsonl"), str(tmp_path / "b.parquet")), key="id")
    assert outline(scan(config)) == [("1", ["one"]), ("2", [" two\n"]), ("p", ["three"])]
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("\ufeff# Title\n", encoding="utf-8")
    (tmp_path / "docs" / "b.txt.gz").write_bytes(gzip.compress("packed ü".encode()))
    (tmp_path / "docs" / "c.rst.zst").write_bytes(zstandard.compress(b"packed too"))
    assert outline(scan(TextConfig(paths=(str(tmp_path / "docs" / "*"),), key="id"))) == [
        ("docs/a.md", ["# Title\n"]),
        ("docs/b.txt.gz", ["packed ü"]),
        ("docs/c.rst.zst", ["packed too"]),
    ]


def test_what_is_no_text_has_a_reason(tmp_path: Path) -> None:
    rows = [{"body": "x"}, {"body": None}, {}, {"body": 3}, {"body": ["x"]}, {"body": ""}, {"body": " \n\t"}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    found = outline(scan(TextConfig(paths=(str(path),), text="body")))
    assert found[0] == ("a.jsonl#0", ["x"])
    assert [reason for _, reason in found[1:]] == ["no_text"] * 4 + ["text_empty"] * 2
    for name, content, reason in (
        ("latin.txt", b"\xe9", "text_not_utf8"),
        ("empty.txt", b"", "text_empty"),
        ("cut.txt.gz", gzip.compress(b"x" * 99)[:-9], "text_unreadable"),
        ("no.txt.zst", b"plain", "text_unreadable"),
    ):
        (tmp_path / name).write_bytes(content)
        (found,) = scan(TextConfig(paths=(str(tmp_path / name),)))
        assert isinstance(found, Reject) and found.reason == reason


def test_texts_are_packed_whole_and_long_ones_are_cut(tmp_path: Path) -> None:
    texts = {f"a.jsonl#{number}": "ab\n" * size for number, size in enumerate((1, 5, 20, 21, 90, 2))}
    path = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts.values()])
    account = run(tmp_path, TextConfig(paths=(str(path),)), {key: [text] for key, text in texts.items()})
    # 64 tokens hold bos, 62 bytes and eos: 63 and 270 bytes are cut.
    assert (account["read"], account["packed"], account["split_parts"]) == (6, 4, 2)
    assert account["parts"]["made"] == 2 + 5


# Interleaved documents


def documents(path: Path, **changes: Any) -> InterleavedConfig:
    return InterleavedConfig(**{"paths": (str(path),), "max_reject_rate": 1.0, **changes})


A, B, C = png(8, 8, 1), png(8, 16, 2), png(24, 8, 3)


def url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


EDGES: dict[str, tuple[Any, Any, Any]] = {
    # texts, images, expected
    "text and picture": (["a", None], [None, A], ["a", A]),
    "both at one index": (["a", "caption"], [None, A], ["a", A, "caption"]),
    "nothing at one index": (["a", None, "b"], [None, None, A], ["a", A, "b"]),
    "texts in a row": (["a", "b", None, "c"], [None, None, A, None], ["a", "b", A, "c"]),
    "white space": ([" \n ", None, "", "  b\n"], [None, A, None, None], [A, "  b\n"]),
    "texts null": (None, [A, B], [A, B]),
    "images null": (["a"], None, ["a"]),
    "no lists": (None, None, "document_empty"),
    "empty lists": ([], [], "document_empty"),
    "only white space": ([" "], [None], "document_empty"),
    "lengths differ": (["a", "b"], [None], "lengths_differ"),
    "a text alone": ("a", [None], "list_malformed"),
    "images in a table": (["a"], {"x": 1}, "list_malformed"),
    "a number": ([1], [None], "text_malformed"),
}


def test_documents_keep_their_order_and_what_is_none_has_a_reason(tmp_path: Path) -> None:
    def plain(images: Any) -> Any:
        return [image and url(image) for image in images] if isinstance(images, list) else images

    rows = [
        {"id": name, "texts": texts, "images": plain(images)} for name, (texts, images, _) in EDGES.items()
    ]
    found = scan(documents(write_lines(tmp_path / "a.jsonl", rows), key="id"))
    assert dict(outline(found)) == {name: expected for name, (_, _, expected) in EDGES.items()}
    assert all(entry.separator == "\n\n" for entry in found if isinstance(entry, RawSample))


TEXTS = [["a", None, "b"], [None], ["c", None]]
IMAGES = [[None, A, None], [B], [None, C]]
VARIANTS = {
    "list<binary>": (pa.list_(pa.string()), pa.list_(pa.binary()), IMAGES),
    "large types": (pa.large_list(pa.large_string()), pa.large_list(pa.large_binary()), IMAGES),
    "fixed lists of views": (pa.list_(pa.string_view()), pa.list_(pa.binary_view()), IMAGES),
    "struct": (
        pa.list_(pa.string()),
        pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        [[image and {"bytes": image, "path": "x.png"} for image in images] for images in IMAGES],
    ),
    "urls": (
        pa.list_(pa.string()),
        pa.list_(pa.string()),
        [[image and url(image) for image in images] for images in IMAGES],
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("order", [("texts", "meta", "images"), ("images", "texts", "meta")])
def test_every_variant_of_the_schema_gives_the_same_documents(
    tmp_path: Path, name: str, order: tuple[str, ...]
) -> None:
    text_type, image_type, images = VARIANTS[name]
    columns = {
        "texts": pa.array(TEXTS, text_type),
        "images": pa.array(images, image_type),
        "meta": pa.array([1, 2, 3]),
    }
    table = pa.table({column: columns[column] for column in order})
    path = tmp_path / "a.arrow"
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    expected = [("a.arrow#0", ["a", A, "b"]), ("a.arrow#1", [B]), ("a.arrow#2", ["c", C])]
    assert outline(scan(documents(path))) == expected
    if "views" not in name:
        pq.write_table(table, tmp_path / "a.parquet")
        found = outline(scan(documents(tmp_path / "a.parquet")))
        assert found == [(key.replace("arrow", "parquet"), content) for key, content in expected]


def test_a_document_lives_on_without_the_pictures_that_fail(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(A)
    broken = png(16, 16)[:-60]  # the header is whole: the pack finds out
    rows = [
        (["x", None, "y"], [None, "none.png", None]),
        ([None, "z"], ["a.png", None]),
        (["l", None, "m", None], [None, url(broken), None, "a.png"]),
        (["n", None], [None, "https://example.org/a.png"]),
        ([None], ["../a.png"]),
    ]
    path = write_lines(tmp_path / "a.jsonl", [{"texts": texts, "images": images} for texts, images in rows])
    # Of the last nothing is left: it is a reject itself.
    samples: dict[str, Segments] = {
        "a.jsonl#0": ["x--y"],
        "a.jsonl#1": [A, "z"],
        "a.jsonl#2": ["l", "m", A],
        "a.jsonl#3": ["n"],
    }
    account = run(tmp_path, documents(path, separator="--"), samples)
    assert (account["read"], account["packed"], account["rejected"]) == (5, 4, {"no_usable_image": 1})
    assert account["media_dropped"] == {
        "image_corrupt": 1,
        "image_missing": 1,
        "image_not_fetched": 1,
    }


def test_pictures_beyond_the_cap_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [
        {"texts": ["a", None, "b", None, "c", None], "images": [None, url(A), None, url(B), None, url(C)]}
    ]
    path = write_lines(tmp_path / "a.jsonl", rows)
    samples: dict[str, Segments] = {"a.jsonl#0": ["a", A, "b", B, "c"]}
    account = run(tmp_path, documents(path, max_images_per_document=2), samples)
    assert account["media_dropped"] == {"over_max_images": 1}
    # Asked for: no loss, however many there are.
    source = documents(
        write_lines(tmp_path / "b.jsonl", rows * 20), max_images_per_document=1, max_reject_rate=0.0
    )
    job = make_config(tmp_path / "many", path, sources={"web": source})
    assert run_job(job)["account"]["web"]["media_dropped"] == {"over_max_images": 40}
    with pytest.raises(ValueError, match='it needs bad_media = "drop"'):
        documents(path, max_images_per_document=2, bad_media="reject")


# Tables of captions


def test_captions_come_from_every_kind_of_table(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for name, data in (("a.png", A), ("b.png", B)):
        (tmp_path / "pictures" / name).write_bytes(data)
    (tmp_path / "a.csv").write_text('file,alt\na.png,"one, two"\nb.png, three \n')
    (tmp_path / "b.tsv").write_text("alt\tfile\none, two\ta.png\nthree\tb.png\n")
    write_lines(
        tmp_path / "c.jsonl",
        [{"file": "a.png", "alt": "one, two"}, {"file": {"path": "b.png"}, "alt": "three"}],
    )
    for name in ("a.csv", "b.tsv", "c.jsonl"):
        config = CaptionsConfig(
            paths=(str(tmp_path / name),), image="file", caption="alt", image_root="pictures"
        )
        assert outline(scan(config)) == [(f"{name}#0", [A, "one, two"]), (f"{name}#1", [B, "three"])]
    images = pa.array(
        [{"bytes": A, "path": None}], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    pq.write_table(pa.table({"image": images, "caption": ["x"], "id": [5]}), tmp_path / "d.parquet")
    assert outline(scan(CaptionsConfig(paths=(str(tmp_path / "d.parquet"),), key="id"))) == [("5", [A, "x"])]


def save_to_disk(folder: Path, rows: Sequence[Mapping[str, Any]], shards: int = 1) -> None:
    """The files that `datasets.Dataset.save_to_disk` writes."""
    folder.mkdir(parents=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.Table.from_pylist(list(rows), pa.schema([("image", image), ("caption", pa.string())]))
    names = [f"data-{number:05d}-of-{shards:05d}.arrow" for number in range(shards)]
    for number, name in enumerate(names):
        part = table.slice(number * len(rows) // shards, len(rows) // shards)
        with pa.ipc.new_stream(folder / name, part.schema) as writer:
            writer.write_table(part)
    (folder / "cache-1234.arrow").write_bytes(b"left behind by a map")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


def test_a_saved_dataset_is_its_data_files_and_a_dict_of_them_all_splits(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": data, "path": None}, "caption": text} for data, text in ((A, "a"), (B, "b"))]
    save_to_disk(tmp_path / "d" / "train", rows, shards=2)
    save_to_disk(tmp_path / "d" / "test", [{"image": {"bytes": C, "path": None}, "caption": "c"}])
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    train = [("data-00000-of-00002.arrow#0", [A, "a"]), ("data-00001-of-00002.arrow#0", [B, "b"])]
    assert outline(scan(CaptionsConfig(paths=(str(tmp_path / "d" / "train"),)))) == train
    both = outline(scan(CaptionsConfig(paths=(str(tmp_path / "d"),))))
    assert both == [("data-00000-of-00001.arrow#0", [C, "c"]), *train]
    assert run(tmp_path, CaptionsConfig(paths=(str(tmp_path / "d"),)), dict(both))["packed"] == 3


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is a folder, but none that datasets.save_to_disk wrote"),
        ({"state.json": "{"}, "no list '_data_files' in it"),
        ({"state.json": '{"_data_files": [{"name": 1}]}'}, "no list '_data_files' in it"),
        ({"state.json": '{"_data_files": [{"filename": "gone.arrow"}]}'}, "gone.arrow: no such file"),
        ({"dataset_dict.json": '{"splits": ["gone"]}'}, "gone is a folder, but none|gone"),
        ({"dataset_dict.json": '{"splits": 1}'}, "no list 'splits' in it"),
    ],
)
def test_a_folder_that_is_no_dataset_is_one_line(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        scan(CaptionsConfig(paths=(str(tmp_path),)))


def test_what_is_no_captioned_picture_has_a_reason(tmp_path: Path) -> None:
    rows = [{"image": url(A), "caption": caption} for caption in (None, 3, "", " \n")]
    path = write_lines(
        tmp_path / "a.jsonl", [*rows, {"image": None, "caption": "x"}, {"caption": "x"}, {"image": "y"}]
    )
    found = outline(scan(CaptionsConfig(paths=(str(path),))))
    assert [content for _, content in found] == [
        "no_caption",
        "no_caption",
        "caption_empty",
        "caption_empty",
        [("image_missing",), "x"],
        [("image_missing",), "x"],
        "no_caption",
    ]


# Prompts


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("{image}{caption}", [A, ("cap", None)]),
        ("{caption}{image}", [("cap", ((0, 3),)), A]),
        ("Say: {image}{caption}", [("Say: ", ()), A, ("cap", ((0, 3),))]),
        ("{image}\nSay: {caption}.", [A, ("\nSay: cap.", ((6, 9),))]),
        ("{caption}: {image}!", [("cap: ", ((0, 3),)), A, ("!", ())]),
    ],
)
def test_of_a_prompt_only_the_caption_is_learned(tmp_path: Path, prompt: str, expected: list[Any]) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"image": url(A), "caption": "cap"}])
    tar = write_tar(tmp_path / "a.tar", captioned("k", A, "cap"))
    for config in (
        CaptionsConfig(paths=(str(path),), prompt=prompt),
        WebDatasetConfig(paths=(str(tar),), prompt=prompt),
    ):
        (sample,) = scan(config)
        assert isinstance(sample, RawSample)
        found = [s.file.read() if isinstance(s, Media) else (s.text, s.learned) for s in sample.segments if s]
        assert found == expected
    (sample,) = scan(CaptionsConfig(paths=(str(path),), prompt=prompt, learn_prompt=True))
    assert isinstance(sample, RawSample)
    assert all(segment.learned is None for segment in sample.segments if isinstance(segment, Text))


@pytest.mark.parametrize(
    "prompt", ["{image}", "{caption}", "{image}{image}{caption}", "{ image}{caption}", ""]
)
def test_a_prompt_without_picture_or_caption_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="prompt must hold"):
        CaptionsConfig(paths=("a",), prompt=prompt)


def test_of_several_prompts_each_key_has_its_own_and_always_the_same(tmp_path: Path) -> None:
    prompts = ("{image}{caption}", "{image} Say it. {caption}", "Look: {image}{caption}")
    rows = [{"image": "a.png", "caption": "c", "name": f"{number}"} for number in range(300)]
    members = [member for row in rows for member in captioned(row["name"], png(8, 8), "c")]
    sources = [
        CaptionsConfig(paths=(str(write_lines(tmp_path / "a.jsonl", rows)),), key="name", prompts=prompts),
        WebDatasetConfig(paths=(str(write_tar(tmp_path / "a.tar", members)),), prompts=prompts),
    ]
    found: list[dict[str, str]] = []
    for config in sources:
        found.append({})
        for entry in scan(config):
            assert isinstance(entry, RawSample)
            found[-1][entry.key] = "".join(s.text if isinstance(s, Text) else "P" for s in entry.segments)
    assert found[0] == found[1] and len(found[0]) == 300
    # 100 of each would be even; 60 is 5 standard deviations below.
    assert all(count > 60 for count in Counter(found[0].values()).values())
    assert set(found[0].values()) == {"Pc", "P Say it. c", "Look: Pc"}
    for settings in ({"prompts": ("{image}",)}, {"prompts": prompts, "prompt": prompts[1]}):
        with pytest.raises(ValueError, match="prompt"):
            CaptionsConfig(paths=("a",), **settings)


def test_labels_of_a_prompt_are_not_learned_in_the_packs(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"image": url(A), "caption": "cap"}])
    config = make_config(
        tmp_path,
        tmp_path,
        sources={"web": CaptionsConfig(paths=(str(path),), prompt="Say: {image}\nIt is {caption}")},
    )
    run_job(config)
    reference = Reference(Path(config.output))
    (pack,) = reference.packs()
    # bos, 5 bytes, begin, 1 image token, end, 7 bytes, c, a, p, eos: the label of a position is the next token.
    (length,) = (document["length"] for document in pack["documents"])
    assert length == 1 + 5 + 3 + 7 + 3 + 1
    tokens, labels = pack["tokens"][:length], pack["labels"][:length]
    learned = np.arange(15, 19)
    assert labels[learned].tolist() == tokens[learned + 1].tolist()
    assert np.flatnonzero(labels != -100).tolist() == learned.tolist()
    assert verify_dataset(Path(config.output))[1] == []


# Whole files


def test_unreadable_files_stop_the_job_or_are_one_reject_each(tmp_path: Path) -> None:
    write_lines(tmp_path / "good.jsonl", [{"text": "fine"}])
    (tmp_path / "bad.parquet").write_bytes(b"no Parquet")
    (tmp_path / "empty.json").write_bytes(b"")
    paths = tuple(str(tmp_path / name) for name in ("good.jsonl", "bad.parquet", "empty.json"))
    with pytest.raises(UserError, match=r"source 'web': .*bad.parquet: not a readable.*bad_file = .reject"):
        run_job(make_config(tmp_path, tmp_path, sources={"web": TextConfig(paths=paths)}))
    config = TextConfig(paths=paths, bad_file="reject", max_reject_rate=1.0)
    account = run(tmp_path, config, {"good.jsonl#0": ["fine"]}, on_change="rebuild")
    assert account["rejected"] == {"file_empty": 1, "file_unreadable": 1} and account["read"] == 3
    assert rejects(tmp_path) == {"bad.parquet#file": "file_unreadable", "empty.json#file": "file_empty"}


def test_a_tar_that_is_none_is_a_reject_if_that_is_wanted(tmp_path: Path) -> None:
    good = write_tar(tmp_path / "a.tar", captioned("k", A, "cap"))
    (tmp_path / "b.tar").write_bytes(b"no tar")
    paths = (str(good), str(tmp_path / "b.tar"))
    config = WebDatasetConfig(paths=paths, bad_file="reject", max_reject_rate=1.0)
    assert run(tmp_path, config, {"k": [A, "cap"]})["rejected"] == {"file_unreadable": 1}
    assert rejects(tmp_path) == {"b.tar#file": "file_unreadable"}
