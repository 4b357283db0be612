"""Which raw files a source's paths mean, where a path may be a folder that `datasets.save_to_disk` wrote.

FOLDER/state.json                       its data-*.arrow files
FOLDER/dataset_dict.json                one such folder per split; all of them
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preprocess.inputs import expand_paths
from shared.errors import UserError


def expand_tables(name: str, paths: Sequence[str]) -> list[str]:
    """The files that paths, patterns and folders name, sorted, each once.

    Raises:
        UserError: a path does not exist, a pattern matches nothing, or a folder is none that `datasets` wrote.
    """
    files = [path for path in paths if not os.path.isdir(path)]
    saved = [file for path in paths if os.path.isdir(path) for file in _saved_files(name, Path(path))]
    return sorted(
        {*(expand_paths(name, files) if files else []), *(expand_paths(name, saved) if saved else [])}
    )


def _saved_files(name: str, folder: Path) -> list[str]:
    if (listing := folder / "dataset_dict.json").is_file():
        splits = _entries(name, listing, "splits")
        return [file for split in splits for file in _saved_files(name, folder / str(split))]
    if (listing := folder / "state.json").is_file():
        # What else lies there, such as cache-*.arrow, is no part of the data set.
        return [str(folder / entry["filename"]) for entry in _entries(name, listing, "_data_files")]
    raise UserError(
        f"source {name!r}: {folder} is a folder, but none that datasets.save_to_disk wrote (no state.json, no "
        f"dataset_dict.json); name its files, such as {folder}/*.parquet"
    )


def _entries(name: str, listing: Path, field: str) -> list[Any]:
    try:
        entries = json.loads(listing.read_text(encoding="utf-8"))[field]
        if isinstance(entries, list) and all(
            isinstance(entry, str) or entry["filename"] for entry in entries
        ):
            return entries
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"source {name!r}: {listing}: no list {field!r} in it; save the data set again")
