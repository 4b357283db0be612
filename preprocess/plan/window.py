"""One window: samples -> pieces -> packs -> shards, and a file of what it did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from preprocess.index import read_blocks
from preprocess.packing import pack_pieces
from preprocess.plan.files import (
    PLAN_OPTIONS,
    PLAN_SCHEMA,
    VALIDATION,
    Ints,
    Mask,
    PlanSettings,
    PlanUnit,
    is_validation,
    kept_rows,
)
from preprocess.plan.mixture import chosen_rows
from preprocess.plan.pieces import Pieces, Samples, cut_into_pieces, piece_segments, sample_images
from preprocess.samples import REJECT_SCHEMA, SEGMENTS_TYPE, reject_table
from shared.arrays import runs
from shared.files import atomic_path, write_json

# A sample that a repeat below 1 does not take: wanted, and no loss.
LEFT_OUT = "left_out_by_mixture"


@dataclass(frozen=True, slots=True)
class WindowTask:
    """`slices`: SLICE_DTYPE, their `unit` counts in `units`. `repeats`: of the units' sources."""

    name: str
    split: str
    units: tuple[PlanUnit, ...]
    slices: npt.NDArray[np.void]
    repeats: dict[str, float]
    settings: PlanSettings

    def __str__(self) -> str:
        return self.name

    @property
    def result(self) -> Path:
        return self.settings.output / f"{self.name}.json"

    @property
    def seed(self) -> list[int]:
        return [self.settings.seed, xxhash.xxh3_64_intdigest(self.name.encode()) >> 32]


def plan_window(task: WindowTask) -> None:
    """Write the window's plan file, its rejects if any, and its result, in this order."""
    settings, config = task.settings, task.settings.config
    samples, rejected = _read_samples(task)
    sources = [unit.source for unit in task.units]
    pieces, blocked = cut_into_pieces(
        samples, sources, settings.too_long, settings.budget, settings.ids, config.images_per_row
    )
    # Another copy of a rejected sample is no second reject: it was never made.
    rejected.append(reject_table([reject for sample, reject in blocked if not samples.copy_n[sample]]))
    packs: list[int] = []
    if len(pieces):
        rng = np.random.default_rng(task.seed)
        pieces, pack, rows, borders = _pack(samples, pieces, settings, rng)
        _write_plan(task, samples, pieces, pack, rows, borders)
        packs = np.diff(borders).tolist()
    rejects = pa.concat_tables(rejected)
    if len(rejects):
        with atomic_path(settings.output / f"{task.name}.rejects.parquet") as temporary:
            pq.write_table(rejects, temporary, compression="zstd")
    write_json(task.result, {"packs": packs, "sources": _count(task, samples, pieces, rejects)})


def _read_samples(task: WindowTask) -> tuple[Samples, list[pa.Table]]:
    """The samples of the window's split that are used here, and those that the mixture leaves out, as rejects."""
    keys, segments, unit_n, row_n, copy_n = [], [], [], [], []
    rejects = [REJECT_SCHEMA.empty_table()]
    for number, unit in enumerate(task.units):
        slices = task.slices[task.slices["unit"] == number]
        blocks = read_blocks(unit.path, ["key", "key_hash", "segments"], slices["group"].tolist())
        tables: list[pa.Table] = []
        for (_, _, _, begin, first, rows, copy), block in zip(slices.tolist(), blocks, strict=True):
            table = block.slice(first, rows)
            eligible, chosen = _choose(task, unit, begin + first, table["key_hash"].to_numpy(), copy)
            tables.append(table.filter(pa.array(chosen)).select(["key", "segments"]))
            row_n.append((begin + first + np.flatnonzero(chosen)).astype(np.int32))
            copy_n.append(np.full(len(tables[-1]), copy, np.int32))
            if copy == 0 and (eligible & ~chosen).any():
                rejects.append(
                    _left_out(task, unit.source, table.filter(pa.array(eligible & ~chosen))["key"])
                )
        own = pa.concat_tables(tables).combine_chunks()
        unit_n.append(np.full(len(own), number, np.int32))
        keys += own["key"].chunks
        segments += own["segments"].chunks
    samples = Samples(
        pa.concat_arrays([pa.array([], pa.string()), *keys]),
        pa.concat_arrays([pa.array([], SEGMENTS_TYPE), *segments]),
        np.concatenate([np.empty(0, np.int32), *unit_n]),
        np.concatenate([np.empty(0, np.int32), *row_n]),
        np.concatenate([np.empty(0, np.int32), *copy_n]),
    )
    return samples, rejects


def _choose(
    task: WindowTask, unit: PlanUnit, row: int, key_hash_n: npt.NDArray[np.uint64], copy: int
) -> tuple[Mask, Mask]:
    """Rows from `row` on that are of the task's split and no dropped duplicates; those of them used in this copy."""
    settings, count = task.settings, len(key_hash_n)
    eligible = kept_rows(settings.dropped, unit.first_row + row, count)
    validation = is_validation(key_hash_n, settings.config.validation_fraction)
    eligible &= validation if task.split == VALIDATION else ~validation
    rows = np.arange(row, row + count)
    return eligible, eligible & chosen_rows(task.repeats[unit.source], copy, settings.seed, unit.place, rows)


def _left_out(task: WindowTask, source: str, keys: pa.ChunkedArray) -> pa.Table:
    count = len(keys)
    fields = {
        "source": pa.repeat(source, count),
        "key": keys,
        "part": pa.repeat(pa.scalar(-1, pa.int32()), count),
        "media": pa.repeat(pa.scalar(-1, pa.int32()), count),
        "reason": pa.repeat(LEFT_OUT, count),
        "detail": pa.repeat(f"repeat {task.repeats[source]:.6g}", count),
    }
    return pa.table(fields, schema=REJECT_SCHEMA)


def _pack(
    samples: Samples, pieces: Pieces, settings: PlanSettings, rng: np.random.Generator
) -> tuple[Pieces, Ints, pa.ListArray, list[int]]:
    """Pieces sorted by pack, the pack of each, the vision rows of its images, and the first pack of every shard.

    The last border is the number of packs.
    """
    budget, config = settings.budget, settings.config
    image_start, patches = sample_images(samples.segments)
    pieces = pieces.take(rng.permutation(len(pieces)))
    images = runs(image_start[pieces.sample] + pieces.first_image, pieces.num_images)
    offsets = np.concatenate([[0], np.cumsum(pieces.num_images)])
    packing = pack_pieces(pieces.end - pieces.start, offsets, patches[images], budget, config.images_per_row)
    # Packs come out by size or in whatever order they were filled.
    pack = rng.permutation(packing.num_packs)[packing.pack_n]
    vision = np.bincount(
        np.repeat(pack, pieces.num_images), weights=patches[images], minlength=packing.num_packs
    )
    bytes_per_pack = vision.astype(np.float64) * settings.geometry.values_per_patch + 12 * budget.S
    order = np.argsort(pack, kind="stable")
    rows = pa.ListArray.from_arrays(
        pa.array(offsets.astype(np.int32)), pa.array(packing.row_i.astype(np.int32))
    )
    return (
        pieces.take(order),
        pack[order],
        rows.take(pa.array(order)),
        cut_shards(bytes_per_pack, config.shard_bytes),
    )


def cut_shards(bytes_per_pack: npt.NDArray[np.float64], shard_bytes: int) -> list[int]:
    """Borders between shards of about `shard_bytes`, equal within one pack, at least one pack each."""
    total = bytes_per_pack.sum()
    num_shards = max(1, round(total / shard_bytes))
    shard = ((np.cumsum(bytes_per_pack) - bytes_per_pack) / (total / num_shards)).astype(np.int64)
    return [0, *(np.flatnonzero(np.diff(shard)) + 1).tolist(), len(bytes_per_pack)]


def _write_plan(
    task: WindowTask,
    samples: Samples,
    pieces: Pieces,
    pack: Ints,
    rows: pa.ListArray,
    borders: list[int],
) -> None:
    """The plan file of the window, one row group per shard."""
    unit = pa.array(samples.unit_n[pieces.sample])
    shard = np.searchsorted(borders, pack, side="right") - 1
    columns = {
        "pack": pack - np.asarray(borders)[shard],
        "source": pa.array([unit.source for unit in task.units]).take(unit),
        "index": pa.array([unit.place for unit in task.units]).take(unit),
        "unit": pa.array([unit.unit for unit in task.units]).take(unit),
        "key": samples.key.take(pa.array(pieces.sample)),
        "row": samples.row_n[pieces.sample],
        "copy": samples.copy_n[pieces.sample],
        **{
            name: getattr(pieces, name) for name in ("part", "parts", "start", "end", "length", "first_image")
        },
        "rows": rows,
        "segments": piece_segments(samples, pieces, task.settings.ids),
    }
    table = pa.table(columns).select(PLAN_SCHEMA.names).cast(PLAN_SCHEMA)
    with (
        atomic_path(task.settings.output / f"{task.name}.parquet") as temporary,
        pq.ParquetWriter(temporary, PLAN_SCHEMA, **PLAN_OPTIONS) as writer,
    ):
        begin = 0
        for count in np.bincount(shard).tolist():
            writer.write_table(table.slice(begin, count), row_group_size=count)
            begin += count


def _count(
    task: WindowTask, samples: Samples, pieces: Pieces, rejects: pa.Table
) -> dict[str, dict[str, Any]]:
    """Per source: samples in one piece (`whole`), samples cut (`split`), and the parts these became.

    `repeated` of them are further copies. `media` and `tokens` are those of the pieces; `rejected` by reason.
    """
    names = sorted({unit.source for unit in task.units})
    source_u = np.array([names.index(unit.source) for unit in task.units])
    source = source_u[samples.unit_n[pieces.sample]]
    cut, first = pieces.parts > 1, pieces.part == 0
    kinds = {
        "whole": ~cut,
        "split": cut & first,
        "parts": cut,
        "repeated": first & (samples.copy_n[pieces.sample] > 0),
        "media": pieces.num_images,
        "tokens": pieces.end - pieces.start,
    }
    sums = {
        kind: np.bincount(source, values, len(names)).astype(np.int64).tolist()
        for kind, values in kinds.items()
    }
    reasons = Counter(zip(rejects["source"].to_pylist(), rejects["reason"].to_pylist(), strict=True))
    return {
        name: {
            **{kind: values[number] for kind, values in sums.items()},
            "rejected": {reason: n for (source, reason), n in sorted(reasons.items()) if source == name},
        }
        for number, name in enumerate(names)
    }
