"""Exact duplicates: samples made of the same texts and pictures, over all sources and both splits.

    hashes   each index file -> its content hashes, sorted, with their rows and where each range begins  (a task each)
    ranges   the same stretch of hash values of all of them, nothing else is read -> equal ones          (a task each)
    bits     one per row, set where a duplicate is dropped: 125 MB for 10^9 samples

A task holds one range, some 2^23 hashes, whatever the number of samples. Of a group that one stays which is used: the
first, in the order of the config, of its files and of their rows, that is not too long for the budgets and that the
mixture takes. What a weight below one repeat takes is not known yet; such a sample stays only where none is sure. The
hash is 64 bits of xxh3: among 10^9 different samples, 0.03 pairs are expected to have one in common.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from preprocess.index import read_blocks
from preprocess.plan.files import Ints, Mask, PlanSettings, PlanUnit, Run, is_validation
from preprocess.plan.mixture import chosen_rows
from preprocess.plan.pieces import Samples, cut_into_pieces
from preprocess.samples import REJECT_SCHEMA
from preprocess.sources.base import SourceConfig
from shared.files import atomic_path, exists, open_file, read_json, read_part, remove_tree, write_json
from shared.remote import as_path

DUPLICATE = "duplicate"
# A task takes 49 bytes for each, 410 MB, where every second one is a duplicate, and its rejects.
HASHES_PER_RANGE = 1 << 23
# The file beside the hashes that names their units.
UNITS = "units.json"
# What a row will come to; of equal samples the lowest stays.
USED, PERHAPS, UNUSED = range(3)


@dataclass(frozen=True, slots=True)
class HashTask:
    """`output`: where the sorted hashes go. `repeat`, `weight`: of the unit's source. `ranges`: how many there are."""

    unit: PlanUnit
    repeat: float
    weight: float
    output: Path
    ranges: int
    settings: PlanSettings

    def __str__(self) -> str:
        return str(self.unit.path)


@dataclass(frozen=True, slots=True)
class RangeTask:
    """Range `number` of `ranges`; `hashes` holds the units (`_write_units`) and the output of their hash tasks."""

    number: int
    ranges: int
    hashes: Path
    drop: bool

    def __str__(self) -> str:
        return f"duplicates, range {self.number} of {self.ranges}"

    @property
    def dropped(self) -> Path:
        return self.hashes / f"range-{self.number:06d}.npy"

    @property
    def rejects(self) -> Path:
        return self.hashes.parent / f"duplicates-{self.number:06d}.rejects.parquet"


def find_duplicates(
    units: Sequence[PlanUnit],
    sources: Mapping[str, SourceConfig],
    settings: PlanSettings,
    *,
    num_rows: int,
    run: Run,
) -> dict[str, dict[str, int]]:
    """Per source that has any: duplicates `found`, `dropped`, and how many have their first `across_splits`.

    Where they are dropped, their rejects and `dropped_bits` are written, too.
    """
    output, drop = settings.output, settings.config.duplicates == "drop"
    summary, hashes = output / "duplicates.json", output / "hashes"
    if exists(summary):
        remove_tree(hashes)
        return read_json(summary)
    ranges = max(1, -(-num_rows // HASHES_PER_RANGE))
    sort = [
        HashTask(unit, source.repeat, source.weight, _hash_file(hashes, number), ranges, settings)
        for number, unit in enumerate(units)
        for source in [sources[unit.source]]
    ]
    run(sort_hashes, sort, label="hashes", total=len(sort))
    _write_units(hashes, units)
    tasks = [RangeTask(number, ranges, hashes, drop) for number in range(ranges)]
    counts = run(compare_range, tasks, label="duplicates", total=ranges)
    if drop:
        _write_bits(dropped_bits(output), num_rows, [task.dropped for task in tasks])
    found, across = (
        sum((Counter(count[kind]) for count in counts), Counter[str]()) for kind in ("found", "across_splits")
    )
    record = {
        source: {"found": count, "dropped": count if drop else 0, "across_splits": across[source]}
        for source, count in sorted(found.items())
    }
    write_json(summary, record)
    remove_tree(hashes)
    return record


def dropped_bits(output: Path) -> Path:
    """The file that says which rows are dropped (`files.kept_rows`)."""
    return output / "dropped.bits"


def sort_hashes(task: HashTask) -> None:
    """Write the number of the first hash of every range and of all hashes, int64 [ranges + 1]; the hashes, uint64,
    rising; and for each 8 * row + 2 * (what it comes to) + (1 if validation), uint32.
    """
    drop = task.settings.config.duplicates == "drop"
    columns = ["key_hash", "content_hash", *(["key", "segments"] if drop else [])]
    hashes, flags = [np.empty(0, np.uint64)], [np.empty(0, np.uint32)]
    begin = 0
    for block in read_blocks(task.unit.path, columns):
        hashes.append(block["content_hash"].to_numpy())
        validation = is_validation(
            block["key_hash"].to_numpy(), task.settings.config.validation_fraction
        ).astype(np.uint32)
        flags.append(2 * _fates(task, block, begin, validation > 0) + validation if drop else validation)
        begin += len(block)
    content = np.concatenate(hashes)
    order = np.argsort(content, kind="stable")
    row = (np.arange(len(content), dtype=np.uint32) << 3) | np.concatenate(flags)
    content = content[order]
    lows = [(number << 64) // task.ranges for number in range(task.ranges)]
    borders = np.append(np.searchsorted(content, np.array(lows, np.uint64)), len(content)).astype(np.int64)
    with atomic_path(task.output) as temporary, open(temporary, "wb") as file:
        for values in (borders, content, row[order]):
            values.tofile(file)


def _fates(task: HashTask, block: pa.Table, begin: int, validation_n: Mask) -> npt.NDArray[np.uint32]:
    """USED, PERHAPS or UNUSED of the rows of a block, which begins at row `begin` of its unit."""
    settings, unit, weighted = task.settings, task.unit, task.weight > 0
    # `source_repeats` gives no less.
    repeat = settings.config.least_repeat if weighted else task.repeat
    chosen = chosen_rows(repeat, 0, settings.seed, unit.place, np.arange(begin, begin + len(block)))
    fate_n = np.where(validation_n | chosen, USED, PERHAPS if weighted else UNUSED).astype(np.uint32)
    zeros = np.zeros(len(block), np.int32)
    samples = Samples(block["key"].combine_chunks(), block["segments"].combine_chunks(), zeros, zeros, zeros)
    images_per_row = settings.config.images_per_row
    _, rejected = cut_into_pieces(
        samples, [unit.source], settings.too_long, settings.budget, settings.ids, images_per_row
    )
    fate_n[[sample for sample, _ in rejected]] = UNUSED
    return fate_n


def _hash_file(hashes: Path, number: int) -> Path:
    """What `sort_hashes` writes of a unit."""
    return hashes / f"{number:06d}.hashes"


def _write_units(hashes: Path, units: Sequence[PlanUnit]) -> None:
    """All units in a file of their own: every range needs them, and in a task they would grow with the inputs."""
    lines = [(unit.source, unit.unit, str(unit.path), unit.first_row) for unit in units]
    write_json(hashes / UNITS, lines)


def _read_units(hashes: Path) -> list[PlanUnit]:
    lines = read_json(hashes / UNITS, mend="run again")
    return [PlanUnit(source, unit, as_path(path), first_row) for source, unit, path, first_row in lines]


def compare_range(task: RangeTask) -> dict[str, dict[str, int]]:
    """Counts by source of `find_duplicates`, for the hashes of one range."""
    units = _read_units(task.hashes)
    hash_n, row_n, unit_n = _read_range(task, len(units))
    order = np.lexsort(((row_n >> 1) & 3, hash_n))  # equal in both: the order of units and rows
    hash_n = hash_n[order]
    again = np.flatnonzero(hash_n[1:] == hash_n[:-1]) + 1
    # The first of its group stands before a run of neighbours in `again`.
    starts = np.flatnonzero(np.diff(again, prepend=-1) != 1)
    first = np.repeat(again[starts] - 1, np.diff(starts, append=len(again)))
    again, first = order[again], order[first]
    across = (row_n[again] ^ row_n[first]) & 1 == 1
    if task.drop:
        _write_dropped(task, units, unit_n, (row_n >> 3).astype(np.int64), again, first)

    def by_source(places: Ints) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for unit, count in enumerate(np.bincount(unit_n[places]).tolist()):
            counts[units[unit].source] += count
        return dict(+counts)

    return {"found": by_source(again), "across_splits": by_source(again[across])}


def _read_range(
    task: RangeTask, num_units: int
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32], npt.NDArray[np.int32]]:
    """Hashes of the range, their rows as `sort_hashes` wrote them, and their units."""
    hashes, rows, counts = [np.empty(0, np.uint64)], [np.empty(0, np.uint32)], []
    body = 8 * (task.ranges + 1)
    for number in range(num_units):
        path = _hash_file(task.hashes, number)
        borders = np.frombuffer(read_part(path, 0, body), np.int64).tolist()
        begin, end, total = borders[task.number], borders[task.number + 1], borders[-1]
        own = read_part(path, body + 8 * begin, body + 8 * end)
        hashes.append(np.frombuffer(own, np.uint64))
        own = read_part(path, body + 8 * total + 4 * begin, body + 8 * total + 4 * end)
        rows.append(np.frombuffer(own, np.uint32))
        counts.append(end - begin)
    units = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return np.concatenate(hashes), np.concatenate(rows), units


def _write_dropped(
    task: RangeTask,
    units: Sequence[PlanUnit],
    unit_n: npt.NDArray[np.int32],
    row_n: Ints,
    again: Ints,
    first: Ints,
) -> None:
    """The numbers of the rows `again`, and a reject for each that names its `first`."""
    first_row_u = np.array([unit.first_row for unit in units], np.int64)
    with atomic_path(task.dropped) as temporary, open(temporary, "wb") as file:
        np.save(file, first_row_u[unit_n[again]] + row_n[again])
    if not len(again):
        return
    both = np.concatenate([again, first])
    keys = _keys(units, unit_n[both], row_n[both])
    sources = pa.array([unit.source for unit in units]).take(pa.array(unit_n[both]))
    count = len(again)
    fields = {
        "source": sources[:count],
        "key": keys[:count],
        "part": pa.repeat(pa.scalar(-1, pa.int32()), count),
        "media": pa.repeat(pa.scalar(-1, pa.int32()), count),
        "reason": pa.repeat(DUPLICATE, count),
        "detail": _join("same content as", sources[count:], keys[count:]),
    }
    with atomic_path(task.rejects) as temporary:
        pq.write_table(pa.table(fields, schema=REJECT_SCHEMA), temporary, compression="zstd")


def _keys(units: Sequence[PlanUnit], unit_n: npt.NDArray[np.int32], row_n: Ints) -> pa.Array:
    """Keys of rows of many index files, each of them read once."""
    order = np.argsort(unit_n, kind="stable")
    numbers, starts = np.unique(unit_n[order], return_index=True)
    parts: list[pa.Array] = []
    for number, rows in zip(numbers.tolist(), np.split(row_n[order], starts[1:]), strict=True):
        own = pa.concat_arrays([c for t in read_blocks(units[number].path, ["key"]) for c in t["key"].chunks])
        parts.append(own.take(pa.array(rows)))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    return pa.concat_arrays(parts).take(pa.array(place))


def _join(words: str, sources: pa.Array, keys: pa.Array) -> pa.Array:
    return pc.call_function("binary_join_element_wise", [pa.scalar(words), sources, keys, pa.scalar(" ")])


def _write_bits(path: Path, num_rows: int, dropped: Sequence[Path]) -> None:
    bits = np.zeros(-(-num_rows // 8), np.uint8)
    for part in dropped:
        with open_file(part) as file:
            rows = np.load(io.BytesIO(file.read()))
        np.bitwise_or.at(bits, rows >> 3, (1 << (rows & 7)).astype(np.uint8))
    with atomic_path(path) as temporary:
        bits.tofile(temporary)
