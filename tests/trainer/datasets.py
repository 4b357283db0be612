"""A finished data set of a few hand-built packs, written through the shared shard writer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from shared.codecs import image_encoder, store_patches
from shared.dataset import describe_contract, fingerprint_of
from shared.files import write_json
from shared.geometry import Budget, Geometry
from shared.schema import IMAGE_DTYPE, SPAN_DTYPE, Document, Pack
from shared.shard_writer import ShardWriter
from shared.tokens import TokenIds
from tests.trainer import batches
from tests.trainer.batches import GEOMETRY, make_batch
from trainer.data.batch import Batch, BatchShape, assemble_batch

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


def make_pack(
    documents: Sequence[batches.Document], budget: Budget, source: str = "test"
) -> tuple[Pack, list[Document]]:
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
    borders = [*np.flatnonzero(positions_S == 0).tolist(), budget.S][: len(documents) + 1]
    spans = enumerate(pairwise(borders))
    return pack, [Document(start, end - start, source, str(i), 0) for i, (start, end) in spans]


def spans_of(documents: Sequence[Document], sources: Sequence[str] = ("test",)) -> np.ndarray:
    """SPAN_DTYPE of a pack's documents."""
    rows = [(document.start, document.length, sources.index(document.source)) for document in documents]
    return np.array(rows, SPAN_DTYPE)


def assemble(packs: Sequence[Sequence[batches.Document]], budget: Budget, /, **settings: Any) -> Batch:
    """What the loader makes of these packs; `settings` of the shape."""
    made = [make_pack(documents, budget) for documents in packs]
    fixed = {"packs": len(packs), "budget": budget, "geometry": GEOMETRY, "pad_token": batches.PAD}
    shape = BatchShape(**{**fixed, **settings})
    return assemble_batch([pack for pack, _ in made], [spans_of(entries) for _, entries in made], shape)


def write_dataset(
    path: Path,
    splits: Mapping[str, Sequence[Sequence[batches.Document]]],
    budget: Budget,
    *,
    geometry: Geometry = GEOMETRY,
    tokens: TokenIds = TOKENS,
    codec: str = "raw",
    sources: Sequence[str] = ("test",),
) -> Path:
    """`sources`: pack i is of source i modulo their number."""
    contract = describe_contract(budget, geometry, tokens, codec)
    encode = image_encoder(codec, geometry, jpeg_quality=95, zstd_level=1)
    (path / "shards").mkdir(parents=True)
    shards = []
    for split, packs in splits.items():
        name = f"{split}-00000.parquet"
        writer = ShardWriter(path / "shards" / name, budget.S, fingerprint_of(contract))
        for number, documents in enumerate(packs):
            pack, entries = make_pack(documents, budget, sources[number % len(sources)])
            stored = store_patches(pack.stored, pack.images, encode)
            writer.append(replace(pack, stored=stored), entries)
        writer.close()
        shards.append({"name": name, "split": split, "packs": len(packs), "bytes": 0, "checksum": ""})
    account = {source: {} for source in sources}
    manifest = {**contract, "fingerprint": fingerprint_of(contract), "shards": shards, "account": account}
    write_json(path / "dataset.json", manifest)
    return path
