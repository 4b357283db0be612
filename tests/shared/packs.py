"""Random packs, shards and finished data sets of a few hundred bytes, made without `preprocess`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared.dataset import describe_contract, fingerprint_of
from shared.files import file_checksum, write_json
from shared.geometry import Budget, Geometry
from shared.schema import IMAGE_DTYPE, Document, Pack
from shared.shard_writer import ShardWriter
from shared.tokens import TokenIds

S = 8
GEOMETRY = Geometry(patch_size=2, merge=2, max_patches_per_image=16)
P = GEOMETRY.values_per_patch  # 1 * 2 * 2 * 3 = 12
BUDGET = Budget(S=S, N=2, L=16)
TOKENS = TokenIds(
    bos=None, eos=1, pad=0, image=2, begin_image=3, end_image=4, vocabulary_size=99, tokenizer_sha256="ab"
)
CONTRACT = describe_contract(BUDGET, GEOMETRY, TOKENS, "raw")
FINGERPRINT = fingerprint_of(CONTRACT)

PackRow = tuple[Pack, list[Document]]


def make_row(seed: int, grids: Sequence[tuple[int, int]] = ()) -> PackRow:
    """A pack of random numbers with one image of h x w patches per entry of `grids`, and two documents."""
    generator = np.random.default_rng(seed)
    tokens, labels, positions = generator.integers(-(2**31), 2**31, (3, S)).astype(np.int32)
    images = np.zeros(len(grids), IMAGE_DTYPE)
    for number, (h, w) in enumerate(grids):
        images[number] = (number + 1, number % 2, 4 * number, 1, h, w, h * w * P)
    patches = generator.integers(0, 256, (sum(h * w for h, w in grids), P), np.uint8)
    pack = Pack(tokens, labels, positions, patches, images, cost=seed * 2**33 + 1)
    return pack, [Document(0, 5, "web", f"é-{seed}", 0), Document(5, 3, "chat" * (seed % 2), "b/1", seed)]


def make_rows() -> list[PackRow]:
    """Six packs: with one image, several and none, also first and last."""
    grids = [[], [(2, 2)], [(4, 2), (2, 6), (2, 2)], [], [(2, 4), (4, 4)], []]
    return [make_row(seed, of_pack) for seed, of_pack in enumerate(grids)]


def write_shard(path: Path, rows: Sequence[PackRow], fingerprint: str = FINGERPRINT) -> Path:
    writer = ShardWriter(path, S, fingerprint)
    for pack, documents in rows:
        writer.append(pack, documents)
    writer.close()
    return path


def write_dataset(directory: Path, shards: Sequence[tuple[str, Sequence[PackRow]]]) -> dict[str, Any]:
    """A finished data set of one shard per (split, rows); returns what `dataset.json` holds."""
    (directory / "shards").mkdir(parents=True)
    entries: list[dict[str, Any]] = []
    for number, (split, rows) in enumerate(shards):
        path = write_shard(directory / "shards" / f"{split}-{number:05d}.parquet", rows)
        checksum, size = file_checksum(path), path.stat().st_size
        entries.append(
            {"name": path.name, "split": split, "packs": len(rows), "bytes": size, "checksum": checksum}
        )
    account = {source: {} for source in ("web", "chat", "")}
    manifest = {**CONTRACT, "fingerprint": FINGERPRINT, "shards": entries, "account": account}
    write_json(directory / "dataset.json", manifest)
    return manifest


def assert_same_pack(found: Pack, expected: Pack) -> None:
    """Bit-equal, type and shape included."""
    for name in ("tokens_S", "labels_S", "positions_S", "stored", "images"):
        here, there = getattr(found, name), getattr(expected, name)
        assert here.dtype == there.dtype and here.shape == there.shape, name
        assert here.tobytes() == there.tobytes(), name
    assert found.cost == expected.cost
