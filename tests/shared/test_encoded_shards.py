"""Shards whose patch column holds frames: mapped like any other, decoded where pixels are asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash

from shared import shard_writer
from shared.codecs import image_decoder, image_encoder, store_patches
from shared.dataset import describe_contract, fingerprint_of, open_dataset
from shared.errors import UserError
from shared.files import file_checksum, write_json
from shared.schema import Pack
from shared.shard_reader import ShardReader
from tests.shared.packs import BUDGET, FINGERPRINT, GEOMETRY, TOKENS, P, PackRow, make_rows, write_shard

ENCODED = ("zstd", "jpeg")


def encoded(rows: list[PackRow], codec: str) -> list[PackRow]:
    encode = image_encoder(codec, GEOMETRY, jpeg_quality=95, zstd_level=1)
    found: list[PackRow] = []
    for pack, documents in rows:
        images = pack.images.copy()
        stored = store_patches(pack.stored, images, encode)
        found.append((replace(pack, stored=stored, images=images), documents))
    return found


def write_encoded(path: Path, codec: str) -> tuple[Path, ShardReader]:
    write_shard(path, encoded(make_rows(), codec))
    return path, ShardReader(path, P, image_decoder(codec, GEOMETRY))


@pytest.mark.parametrize("codec", ENCODED)
def test_frames_are_mapped_and_every_tool_reads_the_same_bytes(tmp_path: Path, codec: str) -> None:
    path, reader = write_encoded(tmp_path / "shard.parquet", codec)
    table = pq.read_table(path, page_checksum_verification=True)
    mapped = np.frombuffer(reader._map, np.uint8)
    for row, (expected, _) in enumerate(encoded(make_rows(), codec)):
        pack = reader.pack(row)
        assert pack.stored.tobytes() == expected.stored.tobytes() == table["patches"][row].as_py()
        assert not pack.stored.size or np.shares_memory(pack.stored, mapped)
        span = reader.byte_ranges(row)["patches"]
        assert path.read_bytes()[span.start : span.stop] == expected.stored.tobytes()
        assert reader.damage(row) is None
        content = b"".join(a.tobytes() for a in (pack.tokens_S, pack.labels_S, pack.positions_S, pack.stored))
        assert pack.checksum() == xxhash.xxh3_64(content).intdigest() == table["checksum"][row].as_py()


def test_pixels_of_a_zstd_shard_are_those_of_the_raw_one(tmp_path: Path) -> None:
    _, reader = write_encoded(tmp_path / "shard.parquet", "zstd")
    for row, (raw, _) in enumerate(make_rows()):
        pack = reader.pack(row)
        assert np.array_equal(pack.patches_XP, raw.patches_XP)
        assert pack.patches_XP.shape == raw.patches_XP.shape and pack.num_patches == len(raw.patches_XP)
        for image in range(len(raw.images)):
            assert np.array_equal(pack.read_image(image), raw.read_image(image))


def test_raw_pixels_are_views_and_images_are_parts_of_them(tmp_path: Path) -> None:
    reader = ShardReader(write_shard(tmp_path / "shard.parquet", make_rows()), P)
    pack = reader.pack(2)  # images of 8, 12 and 4 patches
    assert pack.patches_XP is pack.stored
    parts = [pack.read_image(image) for image in range(3)]
    assert [part.shape for part in parts] == [(8, P), (12, P), (4, P)]
    assert all(np.shares_memory(part, pack.stored) for part in parts)
    assert np.array_equal(np.concatenate(parts), pack.patches_XP)
    with pytest.raises(AssertionError, match="not frames"):
        pack.decode_image(0, np.empty((8, P), np.uint8))


@pytest.mark.parametrize("codec", ENCODED)
def test_a_damaged_frame_names_shard_pack_and_image(tmp_path: Path, codec: str) -> None:
    path, reader = write_encoded(tmp_path / "shard.parquet", codec)
    pack = reader.pack(2)
    start = reader.byte_ranges(2)["patches"].start + int(pack.images["nbytes"][0])
    content = bytearray(path.read_bytes())
    content[start + int(pack.images["nbytes"][1]) // 2] ^= 0x10  # in the middle of the second image
    path.write_bytes(content)
    again = ShardReader(path, P, image_decoder(codec, GEOMETRY)).pack(2)
    with pytest.raises(UserError, match=rf"^shard {path}: pack 2: image 1 is damaged: ") as caught:
        again.read_image(1)
    assert "copy the shard again" in str(caught.value)
    with pytest.raises(UserError, match="pack 2: image 1 is damaged"):
        _ = again.patches_XP
    for image in (0, 2):
        assert np.array_equal(again.read_image(image), pack.read_image(image))


def test_a_frame_in_the_place_of_another_is_damaged(tmp_path: Path) -> None:
    pack, documents = encoded(make_rows(), "zstd")[2]
    images = pack.images.copy()
    images["h"][0], images["w"][0] = 2, 6  # 12 patches; the frame holds 8
    path = write_shard(tmp_path / "shard.parquet", [(replace(pack, images=images), documents)])
    read = ShardReader(path, P, image_decoder("zstd", GEOMETRY)).pack(0)
    with pytest.raises(UserError, match=r"pack 0: image 0 is damaged: .* holds 96 bytes, expected 144"):
        read.read_image(0)


@pytest.mark.parametrize("codec", ENCODED)
def test_a_data_set_decodes_with_the_codec_that_it_names(tmp_path: Path, codec: str) -> None:
    contract = describe_contract(BUDGET, GEOMETRY, TOKENS, codec)
    (tmp_path / "shards").mkdir()
    path = tmp_path / "shards" / "train-00000.parquet"
    write_shard(path, encoded(make_rows(), codec), fingerprint_of(contract))
    entry = {"name": path.name, "split": "train", "packs": 6, "bytes": path.stat().st_size}
    shards = [{**entry, "checksum": file_checksum(path)}]
    write_json(
        tmp_path / "dataset.json", {**contract, "fingerprint": fingerprint_of(contract), "shards": shards}
    )
    dataset = open_dataset(tmp_path)
    assert dataset.codec == codec and fingerprint_of(contract) != FINGERPRINT
    for row, (raw, _) in enumerate(make_rows()):
        pack = dataset.pack("train", row)
        assert pack.patches_XP.shape == raw.patches_XP.shape
        if codec == "zstd":
            assert np.array_equal(pack.patches_XP, raw.patches_XP)


def test_a_blob_that_no_parquet_value_holds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_writer, "MAX_BLOB_BYTES", 96)
    writer = shard_writer.ShardWriter(tmp_path / "shard.parquet", BUDGET.S, FINGERPRINT)
    packs: list[Pack] = [pack for pack, _ in make_rows()]
    writer.append(packs[1], [])  # 4 patches of 12 bytes
    with pytest.raises(UserError, match=r"pack 1: its patches take 288 bytes, .* less than 96; lower"):
        writer.append(packs[2], [])
    writer.close()
