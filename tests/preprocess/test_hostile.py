"""Everything broken, odd and dangerous that is at hand, in one job: no crash, no hang, every file accounted for."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from preprocess.budgets import BudgetConfig
from preprocess.config import PreprocessConfig
from preprocess.job import run_job
from preprocess.sources import AnySource
from preprocess.sources.captions import CaptionsConfig
from preprocess.sources.chat import ChatConfig
from preprocess.sources.interleaved import InterleavedConfig
from preprocess.sources.webdataset import WebDatasetConfig
from preprocess.verify import verify_dataset
from shared.dataset import open_dataset
from shared.files import read_json
from shared.geometry import Geometry
from shared.schema import Document

TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"

# By hand from what MANIFEST.json and odd_samples.expect.json say of each: what is not trained on, and why.
# Everything else is packed. (key, reason); a picture lost from a document that lives on has its number behind.
EXPECTED: dict[str, dict[str, list[str]]] = {
    "pictures": {
        "image_corrupt": [
            "broken_data_stream.png",
            "chunk_no_fctl.png",
            "crash-0c7e0e8e11ce787078f00b5b0ca409a167f070e0.tif",
            "crash-2020-10-test.tif",
            "truncated.jpg",
            "truncated.png",
            "truncated_image.png",
            "truncated_jpeg.jpg",
        ],
        "image_empty": ["empty.jpg"],
        "image_too_elongated": ["940x2.png", "one_row_700x1.png", "strip_tall.png", "strip_wide.jpg"],
        "image_too_many_pixels": [
            "16384x16384.png",
            "badwidth.bmp",
            "decompression_bomb.gif",
            "reallybig.bmp",
        ],
        "image_unreadable": [
            "17000x17000.avif",
            "broken.png",
            "corrupt-header.jpg",
            "decompression_bomb.ico",
            "hopper.heif",
            "html_404.jpg",
            "image_invalid.jpg",
            "negative_size.ppm",
            "png_decompression_dos.png",
            "unknown_compression_method.png",
            "zero_height.j2k",
            "zero_width.gif",
        ],
    },
    "tars": {
        "archive_damaged": [
            "bad_header_checksum.tar#rest",
            "bad_size_field.tar#rest",
            "concatenated.tar#rest",
            "truncated_mid_member.tar#rest",
        ],
        "caption_empty": ["a006", "a007"],
        "caption_not_utf8": ["a004", "a005", "a033", "a033"],
        "duplicate_key": ["a016"],
        "exceeds_S": ["a011"],
        "file_unreadable": ["empty.tar#file", "not_a_tar.tar#file"],
        "image_corrupt": ["a013"],
        "image_empty": ["a012"],
        "image_unreadable": ["a014"],
        "no_caption": ["a001"],
        "no_image": ["README", "a002", "a023", "a024"],
    },
    "documents": {
        "column_missing": ["no_texts_column.parquet#file"],
        "document_empty": ["edge_documents.parquet#9"],
        "file_empty": ["empty.parquet#file"],
        "file_unreadable": ["not_parquet.parquet#file", "truncated.parquet#file"],
        "image_corrupt": ["corrupt_page.parquet#3 picture 0"],
        "image_empty": ["edge_documents.parquet#15 picture 0"],
        "image_unreadable": ["edge_documents.parquet#14 picture 1"],
        "lengths_differ": ["edge_documents.parquet#8"],
    },
    "chats": {
        "content_missing": ["bad_items.json#12/value-null"],
        "content_not_text": ["bad_items.json#13/value-not-string"],
        "file_empty": ["empty.json#file"],
        "image_count_differs": [
            "bad_items.json#1/no-placeholder",
            "bad_items.json#14/image-token-in-answer",
            "bad_items.json#2/placeholder-without-image",
            "bad_items.json#3/two-placeholders-one-image",
            "lines.jsonl#1/no-placeholder",
            "truncated.json#1/no-placeholder",
            "truncated.json#2/placeholder-without-image",
            "truncated.json#3/two-placeholders-one-image",
        ],
        "image_missing": ["bad_items.json#4/missing-file", "truncated.json#4/missing-file"],
        "image_outside_root": ["bad_items.json#15/traversal"],
        "json_invalid": ["lines.jsonl#2"],
        "no_assistant_turn": ["bad_items.json#6/ends-with-human", "truncated.json#6/ends-with-human"],
        "no_turns": [
            "bad_items.json#8/empty-conversation",
            "bad_items.json#9/no-conversations",
            "not_a_list.json#0/1",
        ],
        "rest_unreadable": ["truncated.json#7"],
        "row_not_utf8": ["latin1.json#0"],
    },
}
READ_AND_PACKED = {"pictures": (47, 18), "tars": (91, 69), "documents": (43, 37), "chats": (31, 9)}


def hostile_sources(directory: Path, hostile: Path) -> dict[str, AnySource]:
    """One source per folder; the loose pictures are listed in a table."""
    pictures = directory / "pictures.jsonl"
    rows = [
        {"image": path.name, "caption": f"the picture {path.name}", "key": path.name}
        for path in sorted((hostile / "images").iterdir())
    ]
    pictures.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = directory / "template.jinja"
    template.write_text(TEMPLATE)
    rules = {"max_reject_rate": 1.0, "bad_file": "reject"}
    return {
        "pictures": CaptionsConfig(
            paths=(str(pictures),), image_root=str(hostile / "images"), key="key", **rules
        ),
        "tars": WebDatasetConfig(paths=(f"{hostile}/tars/*.tar",), **rules),
        "documents": InterleavedConfig(paths=(f"{hostile}/parquet/*.parquet",), **rules),
        "chats": ChatConfig(
            paths=(f"{hostile}/chat/*.json*",),
            template=str(template),
            image_root=str(hostile.parent / "chat" / "images"),
            **rules,
        ),
    }


@pytest.fixture(scope="module")
def hostile_job(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> PreprocessConfig:
    directory = tmp_path_factory.mktemp("hostile")
    config = PreprocessConfig(
        output=str(directory / "out"),
        tokenizer=str(shared_data / "tokenizer-bpe8k"),
        sources=hostile_sources(directory, shared_data / "hostile"),
        budget=BudgetConfig(S=4096, N=4, L=1024),
        geometry=Geometry(max_patches_per_image=256),
        executor="serial",
    )
    run_job(config)
    return config


def test_what_cannot_be_trained_on_is_counted_with_the_reason_a_person_would_give(
    hostile_job: PreprocessConfig,
) -> None:
    found: dict[str, dict[str, list[str]]] = {name: {} for name in EXPECTED}
    for row in pq.read_table(Path(hostile_job.output) / "rejects.parquet").to_pylist():
        key = row["key"] if row["media"] < 0 else f"{row['key']} picture {row['media']}"
        found[row["source"]].setdefault(row["reason"], []).append(key)
    for source, reasons in EXPECTED.items():
        assert {reason: sorted(keys) for reason, keys in found[source].items()} == reasons, source


def test_everything_else_is_packed_and_the_account_says_so(hostile_job: PreprocessConfig) -> None:
    account = read_json(Path(hostile_job.output) / "dataset.json")["account"]
    counts = {name: (line["read"], line["packed"] + line["split_parts"]) for name, line in account.items()}
    assert counts == READ_AND_PACKED
    _, faults = verify_dataset(Path(hostile_job.output))
    assert faults == []


def test_every_hostile_file_is_accounted_for(hostile_job: PreprocessConfig, shared_data: Path) -> None:
    """Packed from, or named by a reject; one that holds nothing and hides nothing is read as nothing."""
    output = Path(hostile_job.output)
    manifest = json.loads((shared_data / "hostile" / "MANIFEST.json").read_text())
    rejects = {row["key"] for row in pq.read_table(output / "rejects.parquet").to_pylist()}
    packed = {document.key for shard in open_shards(output) for document in shard}
    for entry in manifest:
        folder, name = entry["file"].split("/")
        if folder == "images":
            assert (name in packed) != (name in rejects), name
        elif folder != "tars" and name != "zero_rows.parquet":
            assert any(key.startswith(f"{name}#") for key in packed | rejects), name


def open_shards(output: Path) -> list[list[Document]]:
    dataset = open_dataset(output)
    readers = [dataset.reader(shard) for shard in dataset.shards]
    return [reader.documents(row) for reader in readers for row in range(len(reader))]
