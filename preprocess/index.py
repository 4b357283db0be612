"""The index: one Parquet file per raw file, one row per sample read, lengths only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from preprocess.samples import INDEX_SCHEMA
from shared.tables import read_table


@dataclass(frozen=True, slots=True)
class IndexedUnit:
    """One raw file; `path` is its index file."""

    source: str
    unit: str
    path: Path


def read_index(path: Path) -> pa.Table:
    """The rows of one index file, INDEX_SCHEMA.

    Raises:
        UserError: it is missing or damaged.
    """
    return read_table(path, mend="delete it and run again, it will be scanned again", schema=INDEX_SCHEMA)
