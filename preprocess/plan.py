"""Plan: index -> which piece goes to which pack and vision row, one plan file per shard.

    index rows -> pieces (split where a sample is longer than a pack) -> split train / validation
               -> shuffled into windows -> packed -> packs shuffled -> cut into shards

A plan file holds all that packing a shard needs, so that shards are independent of each other and of the index.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from preprocess.config import PlanConfig
from preprocess.index import IndexedUnit, read_index
from preprocess.packing import pack_pieces
from preprocess.samples import SEGMENTS_TYPE, TEXT, IndexSegment, Reject, reject_table, segments_column
from preprocess.sources.base import SourceConfig
from preprocess.stream import Part, clip_segments, split_sample
from shared.arrays import runs
from shared.files import atomic_path, write_json
from shared.geometry import Budget, Geometry
from shared.tokens import TokenIds

PLAN_SUMMARY = "plan.json"

# One row per piece, sorted by pack. `index`: its unit's index file below index/. `segments`: those of the piece,
# texts cut to it (`stream.clip_segments`). `length`: tokens of the whole sample. `rows`: the vision rows of its images.
PLAN_SCHEMA = pa.schema(
    [
        ("pack", pa.int32()),
        ("source", pa.dictionary(pa.int32(), pa.string())),
        ("index", pa.dictionary(pa.int32(), pa.string())),
        ("unit", pa.dictionary(pa.int32(), pa.string())),
        ("key", pa.string()),
        ("part", pa.int32()),
        ("parts", pa.int32()),
        ("start", pa.int64()),
        ("end", pa.int64()),
        ("length", pa.int64()),
        ("first_image", pa.int32()),
        ("rows", pa.list_(pa.int32())),
        ("segments", SEGMENTS_TYPE),
    ]
)


@dataclass(slots=True)
class Pieces:
    """Columns over all pieces; `sample` is a row of the concatenated index."""

    sample: npt.NDArray[np.int64]
    part: npt.NDArray[np.int64]
    parts: npt.NDArray[np.int64]
    start: npt.NDArray[np.int64]
    end: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]
    first_image: npt.NDArray[np.int64]
    last_image: npt.NDArray[np.int64]

    @property
    def num_images(self) -> npt.NDArray[np.int64]:
        return self.last_image - self.first_image

    def take(self, chosen: npt.NDArray[np.int64]) -> Pieces:
        return Pieces(*(getattr(self, column.name)[chosen] for column in fields(self)))


def make_plan(
    units: Sequence[IndexedUnit],
    sources: Mapping[str, SourceConfig],
    output: Path,
    *,
    budget: Budget,
    geometry: Geometry,
    ids: TokenIds,
    config: PlanConfig,
    seed: int,
) -> dict[str, Any]:
    """Write the plan files and `plan.json`, the latter last; return what `plan.json` holds."""
    index = _load_index(units)
    pieces, rejects = _cut_into_pieces(index, sources, budget, ids, config.images_per_row)
    image_start, patches = _images_of(index)
    shards: list[dict[str, Any]] = []
    for split, members in _splits(index, pieces, config.validation_fraction):
        rng = np.random.default_rng([seed, xxhash.xxh3_64_intdigest(split.encode()) >> 32])
        order = rng.permutation(members)
        first = image_start[pieces.sample[order]]
        images = runs(first + pieces.first_image[order], pieces.num_images[order])
        pack, rows = _pack_windows(pieces, order, patches[images], budget, config)
        pack = rng.permutation(int(pack.max()) + 1)[pack]
        image_pack = np.repeat(pack, pieces.num_images[order])
        vision = np.bincount(image_pack, weights=patches[images], minlength=int(pack.max()) + 1)
        bytes_per_pack = (vision * geometry.values_per_patch + 12 * budget.S).astype(np.int64)
        for number, packs in enumerate(_cut_shards(bytes_per_pack, config.shard_bytes)):
            name = f"{split}-{number:05d}.parquet"
            here = np.flatnonzero((pack >= packs.start) & (pack < packs.stop))
            here = here[np.argsort(pack[here], kind="stable")]
            own = pieces.take(order[here])
            _write_shard_plan(
                output / name, index, own, pack[here] - packs.start, rows.take(pa.array(here)), ids
            )
            shards.append({"name": name, "split": split, "packs": len(packs), "pieces": len(here)})
    _write_rejects(output / "rejects.parquet", rejects)
    summary = {"shards": shards, "sources": _count(index, pieces, list(sources))}
    write_json(output / PLAN_SUMMARY, summary)
    return summary


def _load_index(units: Sequence[IndexedUnit]) -> pa.Table:
    """All index files, usable samples only, with `source` and `unit` columns."""
    tables: list[pa.Table] = []
    for unit in units:
        table = read_index(unit.path).select(["key", "key_hash", "segments"])
        place = f"{unit.source}/{unit.path.name}"
        for name, value in (("source", unit.source), ("unit", unit.unit), ("index", place)):
            column = pa.DictionaryArray.from_arrays(
                pa.array(np.zeros(len(table), np.int32)), pa.array([value])
            )
            table = table.append_column(name, column)
        tables.append(table)
    return pa.concat_tables(tables).unify_dictionaries().combine_chunks()


def _flat_segments(index: pa.Table) -> tuple[npt.NDArray[np.int64], pa.StructArray]:
    """Offsets [samples + 1] into the flattened segments, and these."""
    lists = index["segments"].combine_chunks()
    offsets = lists.offsets.to_numpy().astype(np.int64)
    return offsets - (offsets[0] if len(offsets) else 0), lists.flatten()


def _images_of(index: pa.Table) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First image of every sample [samples + 1], and the patches of every image."""
    offsets, segments = _flat_segments(index)
    is_image = segments.field("kind").to_numpy() != TEXT
    grid = [segments.field(name).to_numpy().astype(np.int64) for name in ("t", "h", "w")]
    before = np.concatenate([[0], np.cumsum(is_image)])
    return before[offsets], (grid[0] * grid[1] * grid[2])[is_image]


def _cut_into_pieces(
    index: pa.Table, sources: Mapping[str, SourceConfig], budget: Budget, ids: TokenIds, images_per_row: int
) -> tuple[Pieces, list[Reject]]:
    """Pieces of all samples. Those that surely fit one pack are handled as columns, the rest one by one."""
    offsets, segments = _flat_segments(index)
    tokens = np.concatenate([[0], np.cumsum(segments.field("tokens").to_numpy().astype(np.int64))])
    length = tokens[offsets[1:]] - tokens[offsets[:-1]] + int(ids.bos is not None) + 1
    image_start, patches = _images_of(index)
    num_images = np.diff(image_start)
    too_large = np.concatenate([[0], np.cumsum(patches > budget.L)])
    fits = (length <= budget.S) & (num_images <= budget.N)
    fits &= too_large[image_start[1:]] == too_large[image_start[:-1]]
    whole = np.flatnonzero(fits)
    zeros = np.zeros_like(whole)
    rows = [
        np.stack([whole, zeros, zeros + 1, zeros, length[whole], length[whole], zeros, num_images[whole]])
    ]
    rejects: list[Reject] = []
    for sample in np.flatnonzero(~fits).tolist():
        record = index.slice(sample, 1).to_pylist()[0]
        parts = split_sample([IndexSegment(**s) for s in record["segments"]], ids, budget, images_per_row)
        verdict = _judge(parts, sources[record["source"]], int(length[sample]), budget)
        if isinstance(verdict, str):
            detail = f"{length[sample]} tokens, {num_images[sample]} images"
            rejects.append(Reject(record["source"], record["key"], f"exceeds_{verdict}", detail))
        else:
            fields = [
                (
                    sample,
                    number,
                    len(verdict),
                    p.start,
                    p.end,
                    int(length[sample]),
                    p.first_image,
                    p.last_image,
                )
                for number, p in enumerate(verdict)
            ]
            rows.append(np.array(fields, np.int64).T)
    columns = np.concatenate(rows, axis=1)
    return Pieces(*columns[:, np.argsort(columns[0], kind="stable")]), rejects


def _judge(parts: list[Part] | str, source: SourceConfig, length: int, budget: Budget) -> list[Part] | str:
    if isinstance(parts, list) and len(parts) > 1 and source.too_long == "reject":
        return "S" if length > budget.S else "N"
    return parts


def _splits(index: pa.Table, pieces: Pieces, fraction: float) -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
    """("train", pieces), ("validation", pieces): by a hash of the key, the same whatever else is in the run."""
    hashes = index["key_hash"].to_numpy() >> 32
    validation = (hashes < fraction * 2**32)[pieces.sample]
    for split, mask in (("train", ~validation), ("validation", validation)):
        if mask.any():
            yield split, np.flatnonzero(mask)


def _pack_windows(
    pieces: Pieces,
    order: npt.NDArray[np.int64],
    patches_i: npt.NDArray[np.int64],
    budget: Budget,
    config: PlanConfig,
) -> tuple[npt.NDArray[np.int64], pa.ListArray]:
    """Pack of each piece of `order`, and the vision rows of its images; `patches_i` are these, in that order."""
    tokens = pieces.end[order] - pieces.start[order]
    image_offsets = np.concatenate([[0], np.cumsum(pieces.num_images[order])])
    pack = np.empty(len(order), np.int64)
    rows = np.empty(len(patches_i), np.int32)
    count = 0
    for begin in range(0, len(order), config.window):
        end = min(begin + config.window, len(order))
        offsets = image_offsets[begin : end + 1]
        images = slice(int(offsets[0]), int(offsets[-1]))
        packing = pack_pieces(
            tokens[begin:end], offsets - offsets[0], patches_i[images], budget, config.images_per_row
        )
        pack[begin:end] = packing.pack_n + count
        rows[images] = packing.row_i
        count += packing.num_packs
    return pack, pa.ListArray.from_arrays(pa.array(image_offsets.astype(np.int32)), pa.array(rows))


def _cut_shards(bytes_per_pack: npt.NDArray[np.int64], shard_bytes: int) -> Iterator[range]:
    """Ranges of packs of about `shard_bytes`, equal within one pack, at least one pack each."""
    total = bytes_per_pack.sum()
    num_shards = max(1, round(total / shard_bytes))
    # Quotients, not products: bytes times shards leave int64 at some 60 TB.
    shard = ((np.cumsum(bytes_per_pack) - bytes_per_pack) / (total / num_shards)).astype(np.int64)
    borders = [0, *(np.flatnonzero(np.diff(shard)) + 1).tolist(), len(bytes_per_pack)]
    for start, stop in itertools.pairwise(borders):
        yield range(start, stop)


def _write_shard_plan(
    path: Path,
    index: pa.Table,
    pieces: Pieces,
    pack: npt.NDArray[np.int64],
    rows: pa.ListArray,
    ids: TokenIds,
) -> None:
    samples = index.take(pa.array(pieces.sample))
    columns = {
        "pack": pack,
        **{name: samples[name] for name in ("source", "unit", "index", "key")},
        **{
            name: getattr(pieces, name) for name in ("part", "parts", "start", "end", "length", "first_image")
        },
        "rows": rows,
        "segments": _segments_of(samples["segments"], pieces, ids),
    }
    table = pa.table(columns).select(PLAN_SCHEMA.names).cast(PLAN_SCHEMA)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _segments_of(samples: pa.ChunkedArray, pieces: Pieces, ids: TokenIds) -> pa.Array | pa.ChunkedArray:
    """Segments of every piece: whole samples' as they are, parts' clipped."""
    if (pieces.parts == 1).all():
        return samples
    lists = [[IndexSegment(**segment) for segment in sample] for sample in samples.to_pylist()]
    return segments_column(
        [
            clip_segments(own, ids, start, end) if parts > 1 else own
            for own, parts, start, end in zip(
                lists, pieces.parts.tolist(), pieces.start.tolist(), pieces.end.tolist(), strict=True
            )
        ]
    )


def _write_rejects(path: Path, rejects: Sequence[Reject]) -> None:
    with atomic_path(path) as temporary:
        pq.write_table(reject_table(rejects), temporary)


def _count(index: pa.Table, pieces: Pieces, names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Per source: samples in one piece (`whole`), samples cut (`split`), and the parts these became."""
    column = index["source"].combine_chunks()
    position = {name: number for number, name in enumerate(column.dictionary.to_pylist())}
    source = column.indices.to_numpy()[pieces.sample]
    cut, first = pieces.parts > 1, pieces.part == 0

    def count(name: str) -> dict[str, int]:
        own = source == position.get(name, -1)
        kinds = {"whole": own & ~cut, "split": own & cut & first, "parts": own & cut}
        return {kind: int(mask.sum()) for kind, mask in kinds.items()}

    return {name: count(name) for name in names}
