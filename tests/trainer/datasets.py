"""A finished data set of a few hand-built packs, written through the shared shard writer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from shared.codecs import image_encoder, store_patches
from shared.dataset import describe_contract, fingerprint_of
from shared.files import write_json
from shared.geometry import Budget, Geometry
from shared.schema import IMAGE_DTYPE, Document, Pack
from shared.shard_writer import ShardWriter
from shared.tokens import TokenIds
from tests.trainer import batches
from tests.trainer.batches import GEOMETRY, make_batch

TOKENS = TokenIds(
    bos=None,
    eos=batches.EOS,
    pad=batches.PAD,
    image=batches.IMAGE,
    begin_image=batches.BEGIN,
    end_image=batches.END,
    vocabulary_size=batches.VOCABULARY,
    tokenizer_sha256="",
)


def make_pack(documents: Sequence[batches.Document], budget: Budget) -> tuple[Pack, list[Document]]:
    """The pack that the batch of these documents holds, in the form that shards store."""
    batch = make_batch([documents], budget)
    ids_NL = batch.image_ids_NL.numpy()
    positions_S, visual_S = batch.positions_BS[0].numpy(), batch.visual_index_BS[0].numpy()
    images = np.zeros(ids_NL.max() + 1, IMAGE_DTYPE)
    for number in range(len(images)):
        row, offset = np.argwhere(ids_NL == number)[0]
        patches = int((ids_NL == number).sum())
        h, w = batch.image_sizes_NL2[row, offset].tolist()
        first = (row * budget.L + offset) // GEOMETRY.patches_per_token
        start = int(np.flatnonzero(visual_S == first)[0])
        nbytes = patches * GEOMETRY.values_per_patch
        images[number] = (start, row, offset, patches // (h * w), h, w, nbytes)
    pack = Pack(
        tokens_S=batch.tokens_BS[0].numpy(),
        labels_S=batch.labels_BS[0].numpy(),
        positions_S=positions_S,
        stored=batch.pixel_values_NLP.numpy()[ids_NL >= 0],
        images=images,
        cost=1000 + 10 * len(images),
    )
    starts = [*np.flatnonzero(positions_S == 0).tolist()[: len(documents)], budget.S]
    spans = enumerate(pairwise(starts))
    return pack, [Document(start, end - start, "test", str(i), 0) for i, (start, end) in spans]


def write_dataset(
    path: Path,
    splits: Mapping[str, Sequence[Sequence[batches.Document]]],
    budget: Budget,
    *,
    geometry: Geometry = GEOMETRY,
    tokens: TokenIds = TOKENS,
    codec: str = "raw",
) -> Path:
    contract = describe_contract(budget, geometry, tokens, codec)
    encode = image_encoder(codec, geometry, jpeg_quality=95, zstd_level=1)
    (path / "shards").mkdir(parents=True)
    shards = []
    for split, packs in splits.items():
        name = f"{split}-00000.parquet"
        writer = ShardWriter(path / "shards" / name, budget.S, fingerprint_of(contract))
        for documents in packs:
            pack, entries = make_pack(documents, budget)
            stored = store_patches(pack.stored, pack.images, encode)
            writer.append(replace(pack, stored=stored), entries)
        writer.close()
        shards.append({"name": name, "split": split, "packs": len(packs), "bytes": 0, "checksum": ""})
    write_json(path / "dataset.json", {**contract, "fingerprint": fingerprint_of(contract), "shards": shards})
    return path
