"""The committed configs on real documents and captions, and everything hostile through one job."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from preprocess.__main__ import main
from preprocess.config import PlanConfig
from preprocess.job import run_job
from preprocess.sources.interleaved import InterleavedConfig
from preprocess.sources.record import Damage
from preprocess.sources.records import read_records
from preprocess.verify import verify_dataset
from shared.files import read_json
from shared.geometry import Budget, Geometry
from tests.preprocess.inputs import make_config
from tests.preprocess.reference import Reference, Segments, webdataset_samples

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "preprocess"
# What the reference does not do: decode to fewer pixels, and follow profiles.
PLAIN = ["--images.dct_scaling", "false", "--images.convert_profiles", "false", "--executor", "serial"]


def run(name: str, output: Path, shared_data: Path, paths: list[Path], *more: str) -> Path:
    source = {"interleaved": "documents", "captions-table": "captions", "text": "text"}[name]
    words = ["run", str(CONFIGS / f"{name}.toml"), "--output", str(output), *PLAIN, *more]
    words += [
        "--tokenizer",
        str(shared_data / "tokenizer-bpe8k"),
        f"--sources.{source}.paths",
        *map(str, paths),
    ]
    assert main(words) == 0
    return output


def check(dataset: Path, samples: dict[tuple[str, str], Segments]) -> None:
    """Every sample is packed, bit for bit."""
    assert set(Reference(dataset).check(samples)) == set(samples)
    assert verify_dataset(dataset)[1] == []


def interleaved_samples(*paths: Path, separator: str = "\n\n") -> dict[tuple[str, str], Segments]:
    """Documents in which each index holds one of text and picture."""
    samples: dict[tuple[str, str], Segments] = {}
    for path in paths:
        for number, row in enumerate(pq.read_table(path).to_pylist()):
            segments: Segments = []
            for text, image in zip(row["texts"], row["images"], strict=True):
                if image is not None:
                    segments.append(image)
                elif segments and isinstance(segments[-1], str):
                    segments[-1] += separator + text
                else:
                    segments.append(text)
            samples["documents", f"{path.name}#{number}"] = segments
    return samples


@pytest.mark.parametrize(
    ("pattern", "count"), [("*-00001-of*", 51), pytest.param("*-bytes-*", 153, marks=pytest.mark.slow)]
)
def test_every_real_document_is_packed_bit_for_bit(
    shared_data: Path, tmp_path: Path, pattern: str, count: int
) -> None:
    paths = sorted((shared_data / "interleaved").glob(pattern))
    samples = interleaved_samples(*paths)
    assert len(samples) == count
    dataset = run("interleaved", tmp_path / "out", shared_data, paths)
    check(dataset, samples)
    account = read_json(dataset / "dataset.json")["account"]["documents"]
    assert account["read"] == account["packed"] + account["split_parts"] == count
    assert account["rejected"] == account["media_dropped"] == {}


def test_documents_whose_pictures_are_addresses_keep_their_texts(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "interleaved" / "interleaved-urls-00000-of-00001.parquet"
    rows = pq.read_table(path).to_pylist()
    samples: dict[tuple[str, str], Segments] = {
        ("documents", f"{path.name}#{number}"): [
            "\n\n".join(text for text in row["texts"] if text is not None)
        ]
        for number, row in enumerate(rows)
    }
    dataset = run(
        "interleaved", tmp_path / "out", shared_data, [path], "--sources.documents.max_reject_rate", "1"
    )
    check(dataset, samples)
    account = read_json(dataset / "dataset.json")["account"]["documents"]
    number = sum(image is not None for row in rows for image in row["images"])
    assert account["media_dropped"] == {"image_not_fetched": number}


def test_captions_of_a_csv_beside_its_pictures_are_those_of_the_tar(
    shared_data: Path, tmp_path: Path
) -> None:
    tar = shared_data / "cc12m" / "cc12m-train-0000.tar"
    rows: list[tuple[str, str]] = []
    samples: dict[tuple[str, str], Segments] = {}
    for number, (key, (image, caption)) in enumerate(webdataset_samples(tar).items()):
        assert isinstance(image, bytes) and isinstance(caption, str)
        (tmp_path / f"{key}.jpg").write_bytes(image)
        rows.append((f"{key}.jpg", caption))
        samples["captions", f"a.csv#{number}"] = [image, caption]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    prompt = ["--sources.captions.prompt", "{image}{caption}"]
    dataset = run("captions-table", tmp_path / "out", shared_data, [tmp_path / "a.csv"], *prompt)
    assert len(samples) == 32
    check(dataset, samples)
    # Nothing was copied: the pictures are read from their files.
    assert not list((dataset / "index").rglob("*.media"))


def test_texts_of_json_lines_and_whole_files_are_packed(shared_data: Path, tmp_path: Path) -> None:
    whole = sorted(shared_data.glob("*/SOURCES.md"))
    documents = interleaved_samples(*(shared_data / "interleaved").glob("interleaved-bytes-00001*"))
    texts = ["".join(s for s in segments if isinstance(s, str)) for segments in documents.values()]
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    samples: dict[tuple[str, str], Segments] = {
        **{("text", f"{path.parent.name}/SOURCES.md"): [path.read_text(encoding="utf-8")] for path in whole},
        **{("text", f"a.jsonl#{number}"): [text] for number, text in enumerate(texts)},
    }
    assert len(samples) == len(whole) + 51 > 55
    check(run("text", tmp_path / "out", shared_data, [*whole, lines]), samples)


CHAT_FILES: dict[str, tuple[int, dict[int, str]]] = {
    # records, and the reasons of what is lost by number
    "bad_items.json": (17, {}),
    "lines.jsonl": (2, {2: "json_invalid"}),
    "truncated.json": (7, {7: "rest_unreadable"}),
    "latin1.json": (0, {0: "row_not_utf8"}),
    "not_a_list.json": (1, {}),
}


@pytest.mark.parametrize("name", CHAT_FILES)
def test_hostile_json_gives_what_can_be_read(shared_data: Path, name: str) -> None:
    found = list(read_records(str(shared_data / "hostile" / "chat" / name)))
    lost = {entry.number: entry.reason for entry in found if isinstance(entry, Damage)}
    assert (len(found) - len(lost), lost) == CHAT_FILES[name]


def hostile_config(shared_data: Path, directory: Path) -> Any:
    paths = sorted((shared_data / "hostile" / "parquet").glob("*.parquet"))
    rules: dict[str, Any] = {"bad_file": "reject", "max_reject_rate": 1.0}
    sources = {
        "documents": InterleavedConfig(paths=tuple(map(str, paths)), max_images_per_document=50, **rules),
    }
    return make_config(
        directory,
        directory,
        sources=sources,
        budget=Budget(S=4096, N=4, L=1024),
        geometry=Geometry(patch_size=16, merge=2, max_patches_per_image=1024),
        plan=PlanConfig(),
    )


def test_hostile_tables_go_through_one_job(shared_data: Path, tmp_path: Path) -> None:
    config = hostile_config(shared_data, tmp_path)
    account = run_job(config)["account"]
    assert verify_dataset(Path(config.output))[1] == []
    rows = pq.read_table(Path(config.output) / "rejects.parquet").to_pylist()
    files = {row["key"]: row["reason"] for row in rows if row["key"].endswith("#file")}
    assert files == {
        "empty.parquet#file": "file_empty",
        "no_texts_column.parquet#file": "column_missing",
        "not_parquet.parquet#file": "file_unreadable",
        "truncated.parquet#file": "file_unreadable",
    }
    edges = pq.read_table(shared_data / "hostile" / "parquet" / "edge_documents.parquet").to_pylist()
    whole = {
        edges[int(row["key"].partition("#")[2])]["what"]: row["reason"]
        for row in rows
        if row["key"].startswith("edge_documents") and row["part"] == row["media"] == -1
    }
    assert whole == {"empty lists": "document_empty", "lengths differ": "lengths_differ"}
    lost = Counter(
        (edges[int(row["key"].partition("#")[2])]["what"], row["reason"])
        for row in rows
        if row["key"].startswith("edge_documents") and row["media"] >= 0
    )
    assert lost == {
        ("undecodable image in the middle", "image_unreadable"): 1,
        ("zero-byte image", "image_empty"): 1,
        ("one image repeated 60 times", "over_max_images"): 10,
    }
    # 6 + 6 documents of good6 and corrupt_page, 3 + 3 of the variants, 21 edges, 4 files.
    assert account["documents"]["read"] == 6 + 6 + 3 + 3 + 21 + 4
    assert account["documents"]["rejected"] == {
        "column_missing": 1,
        "document_empty": 1,
        "file_empty": 1,
        "file_unreadable": 2,
        "lengths_differ": 1,
    }


def test_variants_of_the_schema_give_the_same_documents_as_plain_ones(
    shared_data: Path, tmp_path: Path
) -> None:
    """hf_image_struct and large_types hold the first documents of good6."""
    names = ["good6", "hf_image_struct", "large_types"]
    paths = [shared_data / "hostile" / "parquet" / f"{name}.parquet" for name in names]
    tables = [pq.read_table(path).to_pylist() for path in paths]
    for row, struct, large in zip(*tables, strict=False):
        assert row["texts"] == struct["texts"] == large["texts"]
        assert row["images"] == [image and image["bytes"] for image in struct["images"]] == large["images"]
    dataset = run("interleaved", tmp_path / "out", shared_data, paths)
    samples = interleaved_samples(paths[0])
    for name, table in zip(names[1:], tables[1:], strict=True):
        for number in range(len(table)):
            samples["documents", f"{name}.parquet#{number}"] = samples["documents", f"good6.parquet#{number}"]
    check(dataset, samples)


def test_a_table_of_bytes_leaves_its_pictures_beside_the_index(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "hostile" / "parquet" / "good6.parquet"
    dataset = run("interleaved", tmp_path / "out", shared_data, [path])
    images = [image for row in pq.read_table(path).to_pylist() for image in row["images"] if image]
    (store,) = (dataset / "index").rglob("*.media")
    assert store.read_bytes() == b"".join(images)
