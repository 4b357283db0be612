"""Look into a finished data set: what a pack holds, where its bytes lie, and where a sample went."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shared.dataset import DataSet
from shared.errors import UserError
from shared.schema import IGNORE_LABEL, IMAGE_DTYPE
from shared.tables import read_table
from shared.tokens import TextTokenizer, reopen_tokenizer

Record = dict[str, Any]
MEND = "copy the data set again"


def find_sample(dataset: DataSet, key: str, source: str = "") -> tuple[list[tuple[str, int]], list[Record]]:
    """(split, pack) of every pack that holds a part of the sample, and the sample's rejects.

    `source` narrows the search where two sources use the same key.

    Raises:
        UserError: the data set knows no such sample.
    """
    places = [
        (split, pack)
        for split in dataset.splits
        for pack, documents in enumerate(_keys_of_packs(dataset, split))
        if any(name == key and (not source or origin == source) for origin, name in documents)
    ]
    wanted = pc.field("key") == key
    if source:
        wanted &= pc.field("source") == source
    rejects = read_table(dataset.path / "rejects.parquet", mend=MEND, filters=wanted).to_pylist()
    if not places and not rejects:
        raise UserError(
            f"data set {dataset.path}: no sample {key!r}{f' in {source!r}' if source else ''}; keys are "
            f"those of the raw data, see the index/ tables"
        )
    return places, rejects


def _keys_of_packs(dataset: DataSet, split: str) -> Iterator[list[tuple[str, str]]]:
    """(source, key) of the documents of every pack of a split."""
    for shard in (entry for entry in dataset.shards if entry.split == split):
        table = read_table(dataset.shard_path(shard), mend=MEND, columns=["documents"])
        lists: pa.ListArray = table["documents"].combine_chunks()
        fields = lists.flatten()
        pairs = list(zip(fields.field("source").to_pylist(), fields.field("key").to_pylist(), strict=True))
        borders = lists.offsets.to_numpy() - lists.offsets[0].as_py()
        for start, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
            yield pairs[start:end]


def pack_record(dataset: DataSet, split: str, number: int) -> Record:
    """Everything about one pack as plain values.

    Raises:
        UserError: the split has no such pack.
    """
    try:
        reader, row = dataset.locate(split, number)
    except IndexError as error:
        raise UserError(f"data set {dataset.path}: {error}; packs are numbered from 0") from None
    pack = reader.pack(row)
    per_token = dataset.geometry.patches_per_token
    images: list[Record] = []
    for entry in pack.images:
        image = {name: int(entry[name]) for name in IMAGE_DTYPE.names or ()}
        images.append({**image, "tokens": image["t"] * image["h"] * image["w"] // per_token})
    tokenizer = reopen_tokenizer(dataset.path / "tokenizer", dataset.tokens)
    documents = [
        {
            **asdict(document),
            "text": _folded_text(pack.tokens_S[document.start :][: document.length], tokenizer),
        }
        for document in reader.documents(row)
    ]
    return {
        "split": split,
        "pack": number,
        "shard": reader.path.name,
        "row": row,
        "bytes": {name: [span.start, span.stop] for name, span in reader.byte_ranges(row).items()},
        "tokens": sum(document.length for document in reader.documents(row)),
        "labels": int((pack.labels_S != IGNORE_LABEL).sum()),
        "patches": pack.num_patches,
        "cost": pack.cost,
        "documents": documents,
        "images": images,
    }


def _folded_text(tokens: np.ndarray[Any, Any], tokenizer: TextTokenizer) -> str:
    """Decoded text with each run of image tokens as `[n image tokens]`."""
    pieces: list[str] = []
    borders = np.flatnonzero(np.diff(tokens == tokenizer.ids.image)) + 1
    for run in np.split(tokens, borders):
        image = len(run) > 0 and run[0] == tokenizer.ids.image
        pieces.append(f"[{len(run)} image tokens]" if image else tokenizer.decode(run.tolist()))
    return "".join(pieces)


def describe_pack(record: Record, dataset: DataSet, sample: str = "") -> list[str]:
    """The record as lines for a person; only the document `sample` and its images when a key is given."""
    budget, pt = dataset.budget, dataset.geometry.temporal_patch_size
    lines = [
        f"pack {record['pack']} of split {record['split']}: row {record['row']} of {record['shard']}",
        f"  {record['tokens']} of {budget.S} tokens, {record['labels']} with a label; "
        f"{record['patches']} of {budget.N * budget.L} patches; {record['cost'] / 1e9:,.0f} GFLOP",
        "  bytes "
        + ", ".join(f"{name} [{start:,}, {stop:,})" for name, (start, stop) in record["bytes"].items()),
    ]
    for document in record["documents"]:
        if sample and document["key"] != sample:
            continue
        start, end = document["start"], document["start"] + document["length"]
        lines.append(
            f"  tokens [{start}, {end}): {document['source']} {document['key']} part {document['part']}: "
            f"{document['text']}"
        )
        for image in record["images"]:
            if start <= image["token_start"] < end:
                last = image["offset"] + image["t"] * image["h"] * image["w"]
                kind = f"video, {image['t'] * pt} frames," if image["t"] > 1 else "image"
                lines.append(
                    f"    {kind} of {image['t']} x {image['h']} x {image['w']} patches: vision row {image['row']}, "
                    f"patches [{image['offset']}, {last}); tokens [{image['token_start']}, "
                    f"{image['token_start'] + image['tokens']}); {image['nbytes']:,} bytes"
                )
    return lines
