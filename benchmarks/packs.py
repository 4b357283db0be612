"""Data sets of made packs, as full as real ones: documents of one image and its text, random pixels and tokens.

For benchmarks that need the sizes of real packs and none of their content.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from shared.dataset import describe_contract, fingerprint_of
from shared.files import write_json
from shared.geometry import Budget, Geometry
from shared.schema import IGNORE_LABEL, IMAGE_DTYPE, Document, Pack
from shared.shard_writer import ShardWriter
from shared.tokens import TokenIds

GEOMETRY = Geometry(patch_size=16, merge=2, max_patches_per_image=1024)
TOKENS = TokenIds(
    bos=None, eos=1, pad=0, image=2, begin_image=3, end_image=4, vocabulary_size=1000, tokenizer_sha256=""
)
# Begin and end of the image, and the end of the text.
FIXED_TOKENS = 3


def write_packs(path: Path, budget: Budget, num_packs: int, *, num_shards: int = 1) -> Path:
    """A finished data set with the split train; all its shards are one file under many names."""
    contract = describe_contract(budget, GEOMETRY, TOKENS, "raw")
    (path / "shards").mkdir(parents=True)
    first = path / "shards" / "train-000000.parquet"
    writer = ShardWriter(first, budget.S, fingerprint_of(contract))
    for number in range(num_packs):
        writer.append(*make_pack(budget, number))
    writer.close()
    names = [f"train-{number:06}.parquet" for number in range(num_shards)]
    for name in names[1:]:
        os.link(first, path / "shards" / name)
    shards = [{"name": n, "split": "train", "packs": num_packs, "bytes": 0, "checksum": ""} for n in names]
    manifest = {"fingerprint": fingerprint_of(contract), "shards": shards, "account": {"made": {}}}
    write_json(path / "dataset.json", {**contract, **manifest})
    return path


def make_pack(budget: Budget, seed: int) -> tuple[Pack, list[Document]]:
    """Images of 16 to 1024 patches until the rows are full, and all tokens that these leave as their texts."""
    random = np.random.default_rng(seed)
    images = _place_images(budget, random)
    visual_i = images["h"] * images["w"] // GEOMETRY.patches_per_token
    text = budget.S - int(visual_i.sum()) - FIXED_TOKENS * len(images)
    assert text >= len(images), f"S {budget.S} has no room for the images of N {budget.N} x L {budget.L}"
    # Texts of unequal length, at least one token each, that fill the pack to the last position.
    cuts = np.sort(random.choice(text - 1, len(images) - 1, replace=False)) + 1
    text_i = np.diff(np.concatenate([[0], cuts, [text]]))
    length_i = FIXED_TOKENS + visual_i + text_i
    start_i = np.concatenate([[0], np.cumsum(length_i)[:-1]])
    images["token_start"] = start_i + 1
    positions_S = np.arange(budget.S) - np.repeat(start_i, length_i)
    tokens_S = random.integers(5, 1000, budget.S).astype(np.int32)
    text_first_S = np.repeat(visual_i + FIXED_TOKENS - 1, length_i)
    # Learned: the text and its end, each at the position before it.
    learned_S = (positions_S >= text_first_S - 1) & (positions_S < np.repeat(length_i, length_i) - 1)
    labels_S = np.where(learned_S, np.roll(tokens_S, -1), IGNORE_LABEL)
    patches = int((images["h"] * images["w"]).sum())
    pack = Pack(
        tokens_S=tokens_S,
        labels_S=labels_S.astype(np.int32),
        positions_S=positions_S.astype(np.int32),
        stored=random.integers(0, 256, (patches, GEOMETRY.values_per_patch), dtype=np.uint8),
        images=images,
        cost=1,
    )
    documents = [
        Document(int(start), int(length), "made", f"{seed}-{number}", 0)
        for number, (start, length) in enumerate(zip(start_i, length_i, strict=True))
    ]
    return pack, documents


def _place_images(budget: Budget, random: np.random.Generator) -> np.ndarray:
    """Images of 4 to 32 patches per side, row after row; the last of a row is what fits."""
    places: list[tuple[int, ...]] = []
    for row in range(budget.N):
        offset = 0
        while (left := budget.L - offset) >= 16:
            h, w = (2 * int(side) for side in random.integers(2, 17, 2))
            while h * w > left:
                h, w = max(2, h // 4 * 2), max(2, w // 4 * 2)
            places.append((0, row, offset, 1, h, w, h * w * GEOMETRY.values_per_patch))
            offset += h * w
    return np.array(places, IMAGE_DTYPE)
