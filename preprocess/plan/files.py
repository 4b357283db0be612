"""What the parts of the plan share: the settings of a task, its inputs, the schema of its output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from preprocess.config import PlanConfig
from preprocess.samples import SEGMENTS_TYPE
from shared.files import read_part
from shared.geometry import Budget, Geometry
from shared.tables import open_table
from shared.tokens import TokenIds

PLAN_SUMMARY = "plan.json"
# Where the config leaves something of the budget open: what was chosen, and the curve it was chosen by.
BUDGET_CHOICE = "budget.json"
TRAIN, VALIDATION = SPLITS = ("train", "validation")

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

# One row per piece, sorted by shard and pack. `pack`: number within its shard. `index`: its unit's index file below
# index/, `row` its sample's row there, as keys may repeat. `copy`: which use of a repeated sample. `segments`: those of
# the piece, texts cut to it (`pieces.piece_segments`). `length`: tokens of the whole sample. `rows`: the vision rows of
# its images.
PLAN_SCHEMA = pa.schema(
    [
        ("pack", pa.int32()),
        ("source", pa.string()),
        ("index", pa.string()),
        ("unit", pa.string()),
        ("key", pa.string()),
        ("row", pa.int32()),
        ("copy", pa.int32()),
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

PLAN_OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    "use_dictionary": ["source", "index", "unit", "segments.list.element.file"],
    "write_statistics": False,
    "write_page_checksum": True,
}


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """A shard and its place: row group `row_group` of the plan file `plan`."""

    name: str
    split: str
    plan: str
    row_group: int
    packs: int


def planned_shards(plan: Mapping[str, Any]) -> Iterator[PlannedShard]:
    """The shards of plan.json, which holds for each but its number of packs, by window: there may be a million."""
    for window in plan["windows"]:
        name, split = window["name"], window["split"]
        for number, packs in enumerate(window["packs"]):
            yield PlannedShard(f"{name}-{number:03d}.parquet", split, f"{name}.parquet", number, packs)


def read_shard_plan(path: Path, row_group: int) -> pa.Table:
    """The pieces of one shard, PLAN_SCHEMA.

    Raises:
        UserError: the plan file is missing or damaged.
    """
    mend = "delete plan/ and shards/ and run again, it will be planned again"
    with open_table(path, mend) as file:
        return file.read_row_group(row_group, use_threads=False).cast(PLAN_SCHEMA)


class Run(Protocol):
    """Runs a function over tasks, on whatever the job runs on; results in order of completion."""

    def __call__(
        self, function: Callable[[Any], Any], tasks: Sequence[Any], *, label: str, total: int
    ) -> list[Any]: ...


@dataclass(frozen=True, slots=True)
class PlanUnit:
    """An index file. `first_row`: the number of its first row among the rows of all index files."""

    source: str
    unit: str
    path: Path
    first_row: int

    @property
    def place(self) -> str:
        """Its path below index/."""
        return f"{self.source}/{self.path.name}"


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """What every task of a plan needs beside its rows."""

    output: Path
    budget: Budget
    geometry: Geometry
    ids: TokenIds
    config: PlanConfig
    seed: int
    too_long: Mapping[str, Literal["split", "reject"]]
    # One bit per row of all index files, set for dropped duplicates; None where none are dropped.
    dropped: Path | None


def is_validation(key_hash_n: npt.NDArray[np.uint64], fraction: float) -> Mask:
    """By a hash of the key alone: the same whatever else is in the run."""
    return (key_hash_n >> 32) < fraction * 2**32


def kept_rows(dropped: Path | None, first: int, count: int) -> Mask:
    """Which of the rows [first, first + count) of all index files are no dropped duplicates."""
    if dropped is None:
        return np.ones(count, bool)
    bits = np.frombuffer(read_part(dropped, first // 8, -(-(first + count) // 8)), np.uint8)
    return np.unpackbits(bits, bitorder="little")[first % 8 :][:count] == 0
