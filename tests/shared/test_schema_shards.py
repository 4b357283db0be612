"""Shards: what the writer stores is what the mapped views and every other Parquet tool read."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from shared import shard_writer
from shared.errors import UserError
from shared.schema import MAPPED_COLUMNS, METADATA_FINGERPRINT, METADATA_VERSION, Pack
from shared.shard_reader import ShardReader
from shared.shard_writer import ShardWriter
from tests.shared.packs import FINGERPRINT, P, PackRow, S, assert_same_pack, make_row, make_rows, write_shard

# What the writer guarantees, in pyarrow's words: with these options a rewritten shard is still a shard.
FAITHFUL: dict[str, Any] = {
    "compression": "NONE",
    "use_dictionary": False,
    "write_statistics": False,
    "data_page_size": 1 << 30,
    "data_page_version": "1.0",
    "write_page_checksum": True,
}
VIEWS = {"tokens": "tokens_S", "labels": "labels_S", "positions": "positions_S", "patches": "stored"}


@pytest.fixture
def rows() -> list[PackRow]:
    return make_rows()


@pytest.fixture
def shard(tmp_path: Path, rows: list[PackRow], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six packs in row groups of 3, 2 and 1: payloads are 96, 144, 384 | 96, 384 | 96 bytes."""
    monkeypatch.setattr(shard_writer, "ROW_GROUP_BYTES", 400)
    path = write_shard(tmp_path / "shard.parquet", rows)
    metadata = pq.read_metadata(path)
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [3, 2, 1]
    return path


def verified(path: Path) -> pa.Table:
    return pq.read_table(path, page_checksum_verification=True)


# Round trip


def check_round_trip(path: Path, rows: list[PackRow]) -> None:
    reader = ShardReader(path, P)
    assert len(reader) == len(rows)
    assert reader.costs.tolist() == [pack.cost for pack, _ in rows]
    for row, (pack, documents) in enumerate(rows):
        assert_same_pack(reader.pack(row), pack)
        assert reader.images(row).tobytes() == pack.images.tobytes()
        assert reader.documents(row) == documents
        spans = [
            (start, length, reader.sources[source]) for start, length, source in reader.document_spans(row)
        ]
        assert spans == [(document.start, document.length, document.source) for document in documents]
        assert reader.damage(row) is None


def test_what_is_written_is_what_is_read_over_several_row_groups(shard: Path, rows: list[PackRow]) -> None:
    check_round_trip(shard, rows)
    reader = ShardReader(shard, P)
    assert reader.fingerprint == FINGERPRINT
    assert reader.num_tokens_per_pack == S


def test_row_groups_also_end_at_a_number_of_packs(
    tmp_path: Path, rows: list[PackRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_writer, "ROW_GROUP_PACKS", 4)
    path = write_shard(tmp_path / "shard.parquet", rows)
    metadata = pq.read_metadata(path)
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [4, 2]
    check_round_trip(path, rows)


def test_packs_without_any_image_make_a_shard(tmp_path: Path) -> None:
    rows = [make_row(seed) for seed in range(3)]
    check_round_trip(write_shard(tmp_path / "text.parquet", rows), rows)


def test_a_shard_may_be_empty(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "empty.parquet", [])
    check_round_trip(path, [])
    assert verified(path).num_rows == 0


def test_the_same_packs_give_the_same_bytes(tmp_path: Path, rows: list[PackRow]) -> None:
    first, second = (write_shard(tmp_path / name, rows).read_bytes() for name in ("a.parquet", "b.parquet"))
    assert first == second


def test_a_row_group_keeps_one_page_beyond_the_limits_of_pyarrow(tmp_path: Path) -> None:
    # pyarrow ends a page after 1 MiB, looking every 1024 rows: 2100 packs of 1152 bytes of patches are 2.3 MiB.
    rows = [make_row(0, [(8, 12)])] * 2100
    reader = ShardReader(write_shard(tmp_path / "large.parquet", rows), P)
    # And after 20,000 rows: 30,000 packs must not become one row group.
    many = ShardReader(write_shard(tmp_path / "many.parquet", [make_row(0)] * 30_000), P)
    assert (len(reader), len(many)) == (2100, 30_000)
    for found in (reader, many):
        for row in (0, 1023, 1024, 2099, len(found) - 1):
            assert found.damage(row) is None


def test_views_are_equal_to_what_pyarrow_reads_column_by_column(shard: Path) -> None:
    reader, table = ShardReader(shard, P), verified(shard)
    assert table.num_rows == len(reader) == 6
    for row in range(6):
        pack = reader.pack(row)
        for column, view in VIEWS.items():
            assert table[column][row].as_py() == getattr(pack, view).tobytes(), column
        images = [tuple(image.values()) for image in table["images"][row].as_py()]
        assert images == pack.images.tolist()
        assert table["cost"][row].as_py() == pack.cost
        assert table["checksum"][row].as_py() == pack.checksum()
        documents = [
            {"start": d.start, "length": d.length, "source": d.source, "key": d.key, "part": d.part}
            for d in reader.documents(row)
        ]
        assert table["documents"][row].as_py() == documents


def test_views_copy_nothing_and_outlive_the_reader(shard: Path, rows: list[PackRow]) -> None:
    reader = ShardReader(shard, P)
    mapped = np.frombuffer(reader._map, np.uint8)
    packs = [reader.pack(row) for row in range(len(reader))]
    for pack in packs:
        for view in (getattr(pack, name) for name in VIEWS.values()):
            assert not view.flags.owndata and not view.flags.writeable
            assert view.size == 0 or np.shares_memory(view, mapped)
    del reader, mapped
    gc.collect()
    for found, (expected, _) in zip(packs, rows, strict=True):
        assert_same_pack(found, expected)


def test_checksum_is_xxh3_of_tokens_labels_positions_and_patches_in_this_order() -> None:
    pack, _ = make_row(1, [(2, 2)])
    payload = b"".join(getattr(pack, view).tobytes() for view in VIEWS.values())
    assert pack.checksum() == xxhash.xxh3_64(payload).intdigest()


# The file as others see it


def test_columns_have_the_types_that_the_format_promises(shard: Path) -> None:
    schema = pq.ParquetFile(shard).schema
    columns = {schema.column(i).path: schema.column(i) for i in range(len(schema))}
    for name in ("tokens", "labels", "positions"):
        assert (columns[name].physical_type, columns[name].length) == ("FIXED_LEN_BYTE_ARRAY", 4 * S)
    assert columns["patches"].physical_type == "BYTE_ARRAY"
    for name in ("token_start", "row", "offset", "t", "h", "w"):
        assert columns[f"images.list.element.{name}"].physical_type == "INT32"
    assert columns["images.list.element.nbytes"].physical_type == "INT64"
    assert columns["documents.list.element.source"].logical_type.type == "STRING"
    assert columns["documents.list.element.key"].logical_type.type == "STRING"
    assert (columns["cost"].physical_type, columns["checksum"].physical_type) == ("INT64", "INT64")
    assert "isSigned=false" in str(columns["checksum"].logical_type)
    assert len(columns) == 4 + 7 + 5 + 2


def test_every_field_of_the_parquet_schema_is_required(shard: Path) -> None:
    schema = pq.ParquetFile(shard).schema
    assert "optional" not in str(schema)
    for column in (schema.column(i) for i in range(len(schema))):
        # Only a repeated level may add to the definition level; an optional field would add one more.
        assert column.max_definition_level == column.max_repetition_level == int(".list." in column.path)


def test_mapped_columns_are_plain_uncompressed_single_pages_and_the_others_are_compressed(
    shard: Path,
) -> None:
    metadata = pq.read_metadata(shard)
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(index)
            if chunk.path_in_schema in MAPPED_COLUMNS:
                assert chunk.compression == "UNCOMPRESSED" and not chunk.has_dictionary_page
                assert "PLAIN" in chunk.encodings
            else:
                assert chunk.compression == "ZSTD"


def test_metadata_carries_the_format_version_and_the_fingerprint(shard: Path) -> None:
    metadata = pq.read_metadata(shard).metadata
    assert metadata[b"parquetry.format_version"] == b"1"
    assert metadata[b"parquetry.fingerprint"] == FINGERPRINT.encode()


# Shards that are refused, each with its reason


def rewrite(shard: Path, change: Callable[[pa.Table], pa.Table] | None = None, **options: Any) -> Path:
    table = verified(shard)
    other = shard.with_name("rewritten.parquet")
    pq.write_table(change(table) if change else table, other, **{**FAITHFUL, **options})
    return other


def refusal(path: Path, values_per_patch: int = P) -> str:
    with pytest.raises(UserError) as caught:
        ShardReader(path, values_per_patch)
    message = str(caught.value)
    assert message.startswith(f"shard {path}: ")
    return message


def test_a_shard_that_was_rewritten_faithfully_is_still_one(shard: Path, rows: list[PackRow]) -> None:
    # The control of the tests below: each changes one thing of this.
    check_round_trip(rewrite(shard), rows)


@pytest.mark.parametrize(
    ("options", "column", "reason"),
    [
        ({"compression": "ZSTD"}, "tokens", "it is compressed (ZSTD)"),
        (
            {"compression": {"tokens": "NONE", "labels": "NONE", "positions": "SNAPPY"}},
            "positions",
            "it is compressed (SNAPPY)",
        ),
        ({"use_dictionary": True}, "tokens", "it is dictionary-encoded"),
        ({"use_dictionary": ["patches"]}, "patches", "it is dictionary-encoded"),
        (
            {"data_page_size": 64, "write_batch_size": 1},
            "tokens",
            "row group 0 has more than one data page",
        ),
        ({"data_page_version": "2.0"}, "tokens", "its first page is not a PLAIN data page"),
        (
            {"column_encoding": {"patches": "DELTA_LENGTH_BYTE_ARRAY"}},
            "patches",
            "its first page is not a PLAIN data page",
        ),
    ],
)
def test_another_layout_is_refused_with_the_column_and_the_reason(
    shard: Path, options: dict[str, Any], column: str, reason: str
) -> None:
    message = refusal(rewrite(shard, **options))
    assert f"column {column!r} cannot be mapped: {reason}" in message
    assert "restore the original" in message


def retype(name: str, kind: pa.DataType, nullable: bool = False) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        place = table.schema.get_field_index(name)
        values = table[name].cast(kind)
        return table.set_column(place, pa.field(name, kind, nullable), values)

    return change


def with_metadata(**entries: str | None) -> Callable[[pa.Table], pa.Table]:
    keys = {"version": METADATA_VERSION, "fingerprint": METADATA_FINGERPRINT}

    def change(table: pa.Table) -> pa.Table:
        metadata = dict(table.schema.metadata)
        for name, value in entries.items():
            metadata[keys[name]] = (value or "").encode()
            if value is None:
                del metadata[keys[name]]
        return table.replace_schema_metadata(metadata)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_metadata(version="2"), "format version 2, this reader knows 1"),
        (with_metadata(version=None), "has no format version"),
        (with_metadata(fingerprint=None), "has no fingerprint"),
        (lambda table: table.drop_columns(["cost"]), "columns are"),
        (lambda table: table.drop_columns(["tokens"]), "columns are"),
        (lambda table: table.append_column("more", pa.array(range(6))), "columns are"),
        (lambda table: table.select([1, 0, *range(2, 8)]), "columns are"),
        (retype("cost", pa.int64(), nullable=True), "column 'cost' is int64, expected int64 not null"),
        (retype("cost", pa.int32()), "column 'cost' is int32, expected int64 not null"),
        (retype("tokens", pa.large_binary()), "column 'tokens' is large_binary, expected fixed_size_binary"),
        (
            retype("labels", pa.binary(4 * S), nullable=True),
            "column 'labels' is fixed_size_binary[32], expec",
        ),
    ],
)
def test_another_schema_is_refused_with_what_was_expected(
    shard: Path, change: Callable[[pa.Table], pa.Table], reason: str
) -> None:
    if reason.startswith("column 'cost' is int32"):
        shard = write_shard(shard, [(replace(pack, cost=1), documents) for pack, documents in make_rows()])
    assert reason in refusal(rewrite(shard, change))


def test_blobs_of_other_lengths_than_the_images_say_are_refused(shard: Path) -> None:
    def swap(table: pa.Table) -> pa.Table:
        blobs = table["patches"].to_pylist()
        blobs[1], blobs[2] = blobs[2], blobs[1]
        place, field = 3, table.schema.field("patches")
        return table.set_column(place, field, pa.array(blobs, pa.large_binary()))

    message = refusal(rewrite(shard, swap))
    assert "column 'patches' cannot be mapped: the blob lengths differ" in message


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path, shard: Path) -> None:
    other = tmp_path / "other.parquet"
    for content in (b"", b"PAR1", b"not a shard" * 100, shard.read_bytes()[:-100]):
        other.write_bytes(content)
        assert "not a Parquet file" in refusal(other)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "gone.parquet")


def test_another_size_of_patches_is_refused(shard: Path) -> None:
    assert "not a whole number of patches of P = 7 values" in refusal(shard, 7)


# Damage


def place_of(reader: ShardReader, view: np.ndarray) -> int:
    """Where the bytes of a view lie in the file."""
    start = np.frombuffer(reader._map, np.uint8).__array_interface__["data"][0]
    return view.__array_interface__["data"][0] - start


@pytest.mark.parametrize("column", MAPPED_COLUMNS)
@pytest.mark.parametrize("row", [2, 4])
def test_a_flipped_bit_is_found_by_the_checksum_of_its_pack_and_by_the_page_crc(
    shard: Path, column: str, row: int
) -> None:
    reader = ShardReader(shard, P)
    view = getattr(reader.pack(row), VIEWS[column]).view(np.uint8).reshape(-1)
    for place in (0, view.nbytes - 1):
        content = bytearray(shard.read_bytes())
        content[place_of(reader, view) + place] ^= 0x10
        damaged = shard.with_name("damaged.parquet")
        damaged.write_bytes(content)
        again = ShardReader(damaged, P)
        for index in range(len(again)):
            message = again.damage(index)
            assert (message is not None) == (index == row)
        assert "checksum is" in str(again.damage(row)) and "expected" in str(again.damage(row))
        with pytest.raises(OSError, match=r"(?i)crc"):
            verified(damaged)


@pytest.mark.parametrize("leaf", ["images.list.element.row", "cost", "checksum"])
def test_a_flipped_bit_in_a_small_column_is_found_when_the_shard_is_opened(shard: Path, leaf: str) -> None:
    group = pq.read_metadata(shard).row_group(0)
    chunk = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == leaf)
    content = bytearray(shard.read_bytes())
    content[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 0x10
    shard.write_bytes(content)
    assert "are damaged" in refusal(shard)


# What the writer does not accept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda pack: replace(pack, tokens_S=pack.tokens_S[:-1]),
            r"tokens is int32\[7\], expected int32\[8\]",
        ),
        (lambda pack: replace(pack, labels_S=pack.labels_S.astype(np.int64)), r"labels is int64\[8\]"),
        (lambda pack: replace(pack, stored=pack.stored[:, ::2]), "contiguous uint8"),
        (lambda pack: replace(pack, stored=pack.stored.astype(np.int8)), "contiguous uint8"),
        (
            lambda pack: replace(pack, stored=pack.stored[:-1]),
            "images claim 96 bytes, the patch blob has 84",
        ),
    ],
)
def test_a_pack_that_does_not_fit_is_refused_by_the_writer(
    tmp_path: Path, change: Callable[[Pack], Pack], message: str
) -> None:
    writer = ShardWriter(tmp_path / "shard.parquet", S, FINGERPRINT)
    pack, documents = make_row(0, [(2, 4)])  # 8 patches of 12 bytes
    with pytest.raises(ValueError, match=f"pack 0: .*{message}"):
        writer.append(change(pack), documents)
    writer.close()


def test_packs_written_into_the_room_of_the_writer_are_those_that_are_copied_there(
    tmp_path: Path, rows: list[PackRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_writer, "ROW_GROUP_BYTES", 400)
    copied = write_shard(tmp_path / "copied", rows)
    writer = ShardWriter(tmp_path / "written", S, FINGERPRINT)
    for pack, documents in rows:
        room = writer.room(pack.stored.nbytes).reshape(pack.stored.shape)
        room[...] = pack.stored
        writer.append(replace(pack, stored=room), documents)
    writer.close()
    assert (tmp_path / "written").read_bytes() == copied.read_bytes()
    check_round_trip(tmp_path / "written", rows)


def test_a_pack_larger_than_the_room_that_is_left_moves_those_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        shard_writer, "ROW_GROUP_BYTES", 300
    )  # of 96 bytes of tokens and the patches, each pack
    rows = [make_row(0, [(2, 2)]), make_row(1, [(4, 4)] * 9), make_row(2, [(2, 2)])]  # 48, 1728 and 48 bytes
    check_round_trip(write_shard(tmp_path / "shard.parquet", rows), rows)
