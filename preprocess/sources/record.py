"""One record of a container, or what is lost of it; and whole files that are lost."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from preprocess.sources.base import BadFileError
from shared.errors import closest
from shared.remote import shown

# A longer line, list item or field is another kind of file, and is not read into memory to find out.
MAX_RECORD_BYTES = 64 << 20

Value = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Record:
    """Row or item `number` of a file, counted from 0 with those that are damaged; of JSON lines, the line."""

    number: int
    value: Value


@dataclass(frozen=True, slots=True)
class Damage:
    """A row that is lost; with the reason "rest_unreadable", all rows from `number` on."""

    number: int
    reason: str
    detail: str


def is_damage(error: Exception) -> bool:
    """Whether an error of pyarrow tells of the content: not of the place it lies in (errno is set), nor of this
    machine's memory, unless no machine has so much."""
    if isinstance(error, MemoryError):
        size = re.search(r"of size (\d+)", str(error))
        return size is not None and int(size[1]) > 1 << 40
    return not isinstance(error, OSError) or error.errno is None


def unreadable(unit: str, kind: str, error: Exception) -> BadFileError:
    return BadFileError("file_unreadable", f"{shown(unit)}: not a readable {kind} ({error}); get it again")


def require_columns(unit: str, columns: Sequence[str] | None, names: Sequence[str]) -> None:
    """Raises: BadFileError: one is not there, or there twice."""
    for column in columns or ():
        if column not in names:
            raise BadFileError(
                "column_missing", f"{shown(unit)}: no column {column!r}; {closest(column, names)}"
            )
        if names.count(column) > 1:
            raise BadFileError(
                "column_twice", f"{shown(unit)}: column {column!r} is there {names.count(column)} times"
            )
