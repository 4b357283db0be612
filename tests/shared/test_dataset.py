"""`dataset.json`: opening a finished data set, finding its packs, and refusing what is not one."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.dataset import describe_contract, fingerprint_of, open_dataset
from shared.errors import UserError
from shared.files import write_json
from tests.shared.packs import (
    BUDGET,
    CONTRACT,
    FINGERPRINT,
    GEOMETRY,
    TOKENS,
    assert_same_pack,
    make_row,
    write_dataset,
    write_shard,
)

# Two splits whose shards alternate; one shard is empty.
TRAIN = [
    make_row(1, [(2, 2)]),
    make_row(2),
    make_row(3, [(4, 2), (2, 2)]),
    make_row(4),
    make_row(5, [(2, 4)]),
]
VALIDATION = [make_row(6, [(2, 2)]), make_row(7), make_row(8)]
SHARDS = [
    ("train", TRAIN[:2]),
    ("validation", VALIDATION[:1]),
    ("train", []),
    ("train", TRAIN[2:]),
    ("validation", VALIDATION[1:]),
]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "dataset", SHARDS)
    return tmp_path / "dataset"


def test_packs_are_numbered_across_the_shards_of_their_split(directory: Path) -> None:
    dataset = open_dataset(directory)
    assert dataset.splits == ["train", "validation"]
    assert (dataset.num_packs("train"), dataset.num_packs("validation")) == (5, 3)
    for split, rows in (("train", TRAIN), ("validation", VALIDATION)):
        for index, (pack, documents) in enumerate(rows):
            assert_same_pack(dataset.pack(split, index), pack)
            assert dataset.documents(split, index) == documents
    reader, row = dataset.locate("train", 3)
    assert (reader.path.name, row) == ("train-00003.parquet", 1)  # packs 0, 1 | none | 2, 3, 4
    assert dataset.reader(dataset.shards[3]) is reader, "a shard is mapped once"


def test_costs_come_in_the_order_that_is_asked_for(directory: Path) -> None:
    costs = open_dataset(directory).costs("train", np.array([4, 0, 2, 0]))
    assert costs.tolist() == [TRAIN[i][0].cost for i in (4, 0, 2, 0)]


def test_spans_number_the_sources_of_the_account_in_every_shard(directory: Path) -> None:
    dataset = open_dataset(directory)
    assert dataset.sources == ["", "chat", "web"]
    # Odd seeds: "web", then "chat"; even ones: "web", then a source without a name.
    found = [dataset.document_spans("train", index).tolist() for index in range(5)]
    assert found == [[(0, 5, 2), (5, 3, second)] for second in (1, 0, 1, 0, 1)]


def test_a_source_that_the_account_does_not_know_is_named(directory: Path) -> None:
    manifest = json.loads((directory / "dataset.json").read_text())
    for account, complaint in (({"web": {}, "": {}}, "source 'chat'"), (None, "no account")):
        write_json(directory / "dataset.json", {**manifest, "account": account})
        with pytest.raises(UserError, match=complaint):
            open_dataset(directory).document_spans("train", 0)


@pytest.mark.parametrize("index", [-1, 5])
def test_a_pack_that_is_not_there_is_an_index_error(directory: Path, index: int) -> None:
    with pytest.raises(IndexError, match=f"pack {index} of 5 in split 'train'"):
        open_dataset(directory).locate("train", index)


def test_the_contract_comes_back_as_it_was_written(directory: Path) -> None:
    dataset = open_dataset(str(directory))
    assert (dataset.budget, dataset.geometry, dataset.tokens, dataset.codec) == (
        BUDGET,
        GEOMETRY,
        TOKENS,
        "raw",
    )
    assert dataset.fingerprint == FINGERPRINT == fingerprint_of(CONTRACT)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("budget", "S", 16),
        ("geometry", "filter", "bicubic"),
        ("geometry", "patch_order", "raster"),
        ("tokens", "tokenizer_sha256", "other"),
        ("", "codec", "zstd"),
        ("", "format_version", 2),
    ],
)
def test_the_fingerprint_covers_every_part_of_the_contract(section: str, key: str, value: Any) -> None:
    contract = json.loads(json.dumps(describe_contract(BUDGET, GEOMETRY, TOKENS, "raw")))
    assert fingerprint_of(contract) == FINGERPRINT, "a contract read back from JSON has the same fingerprint"
    (contract[section] if section else contract)[key] = value
    assert fingerprint_of(contract) != FINGERPRINT


def refusal(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_dataset(directory)
    message = str(caught.value)
    assert str(directory) in message and "\n" not in message
    return message


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    assert "no such directory" in refusal(tmp_path / "gone")


def test_without_dataset_json_it_is_not_complete(directory: Path) -> None:
    (directory / "dataset.json").unlink()
    assert "no dataset.json, so it is not complete" in refusal(directory)


def test_a_torn_dataset_json_is_an_error(directory: Path) -> None:
    path = directory / "dataset.json"
    path.write_text(path.read_text()[:-20])
    assert "dataset.json: not valid JSON" in refusal(directory)


@pytest.mark.parametrize("content", ["[]", "{}", '{"format_version": 2}', '{"format_version": "1"}'])
def test_another_format_version_is_refused(directory: Path, content: str) -> None:
    (directory / "dataset.json").write_text(content)
    assert "this program knows 1; update parquetry" in refusal(directory)


def edit(directory: Path, change: Callable[[dict[str, Any]], Any], sign: bool = False) -> Path:
    """Change dataset.json; with `sign`, give it the fingerprint of what it now says."""
    manifest = json.loads((directory / "dataset.json").read_text())
    change(manifest)
    if sign:
        manifest["fingerprint"] = fingerprint_of({key: manifest[key] for key in CONTRACT})
    write_json(directory / "dataset.json", manifest)
    return directory


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["budget"].update(S=16),
        lambda manifest: manifest["geometry"].update(merge=1),
        lambda manifest: manifest["geometry"].update(mean=[0.5, 0.5, 0.4]),
        lambda manifest: manifest["tokens"].update(eos=5),
        lambda manifest: manifest.update(fingerprint="0" * 64),
    ],
)
def test_an_edited_contract_does_not_match_its_fingerprint(
    directory: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    assert "the fingerprint in dataset.json does not match" in refusal(edit(directory, change))


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.pop("budget"),
        lambda manifest: manifest.update(budget=3),
        lambda manifest: manifest["budget"].update(S=0),
        lambda manifest: manifest["geometry"].update(colour="blue"),
        lambda manifest: manifest["tokens"].pop("eos"),
        lambda manifest: manifest["shards"][0].pop("split"),
        lambda manifest: manifest.update(shards=None),
    ],
)
def test_a_dataset_json_without_its_keys_is_not_valid(
    directory: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    assert "dataset.json is not valid" in refusal(edit(directory, change))


def test_an_unknown_codec_is_named(directory: Path) -> None:
    message = refusal(edit(directory, lambda manifest: manifest.update(codec="webp"), sign=True))
    assert "codec 'webp'" in message and "codecs: raw" in message


def test_an_unknown_patch_order_is_named(directory: Path) -> None:
    change = edit(directory, lambda manifest: manifest["geometry"].update(patch_order="c h w"), sign=True)
    assert "patch order 'c h w'" in refusal(change)


def test_an_unknown_split_names_the_closest(directory: Path) -> None:
    with pytest.raises(UserError, match="has no split 'valid'; did you mean 'validation'"):
        open_dataset(directory).num_packs("valid")
    with pytest.raises(UserError, match="has no split 'zzz'; known: train, validation"):
        open_dataset(directory).pack("zzz", 0)


def test_a_shard_of_another_data_set_is_refused(directory: Path) -> None:
    path = directory / "shards" / "train-00000.parquet"
    write_shard(path, TRAIN[:2], fingerprint="f" * 64)
    with pytest.raises(UserError, match=rf"shard {path}: belongs to another data set \(fingerprint ffffffff"):
        open_dataset(directory).pack("train", 0)


def test_a_shard_with_another_number_of_packs_is_refused(directory: Path) -> None:
    write_shard(directory / "shards" / "train-00000.parquet", TRAIN[:1])
    with pytest.raises(UserError, match=r"1 packs; expected .*, 2 packs"):
        open_dataset(directory).pack("train", 0)


def test_a_missing_shard_is_named_when_it_is_needed(directory: Path) -> None:
    (directory / "shards" / "train-00000.parquet").unlink()
    dataset = open_dataset(directory)
    assert_same_pack(dataset.pack("train", 2), TRAIN[2][0])
    with pytest.raises(UserError, match=r"train-00000\.parquet: no such file"):
        dataset.pack("train", 0)


def test_only_shards_that_are_mapped_here_need_open_files(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 200))  # 5 shards and 256 others are needed
    with pytest.raises(UserError, match="5 shards need 261 open files, the limit is 200; raise it"):
        open_dataset(directory)
    assert len(open_dataset(directory, lambda shard: None).shards) == 5


def test_identity_changes_with_a_shard_and_with_nothing_else(directory: Path) -> None:
    before = open_dataset(directory).identity
    assert open_dataset(edit(directory, lambda manifest: manifest.update(made_by="me"))).identity == before
    edit(directory, lambda manifest: manifest["shards"][1].update(checksum="0" * 16))
    changed = open_dataset(directory).identity
    edit(directory, lambda manifest: manifest["shards"].reverse())
    assert len({before, changed, open_dataset(directory).identity}) == 3
