"""Which raw files a source's paths mean, where a path may be a folder, here or in a store, that
`datasets.save_to_disk` wrote.

FOLDER/state.json                       its data-*.arrow files
FOLDER/dataset_dict.json                one such folder per split; all of them
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from preprocess.inputs import expand_paths, open_input
from preprocess.sources.records import container_of
from shared import remote
from shared.errors import UserError
from shared.remote import is_remote, shown

_STATE, _DICT = "state.json", "dataset_dict.json"


def expand_tables(name: str, paths: Sequence[str]) -> list[str]:
    """The files that paths, patterns and folders name, sorted, each once.

    Raises:
        UserError: a path does not exist, a pattern matches nothing, or a folder is none that `datasets` wrote.
    """
    folders = {path for path in paths if _is_folder(path)}
    files = [path for path in paths if path not in folders]
    saved = [file for path in folders for file in _saved_files(name, path.rstrip("/"))]
    return sorted(
        {*(expand_paths(name, files) if files else []), *(expand_paths(name, saved) if saved else [])}
    )


def _is_folder(path: str) -> bool:
    """Of a store, which has no folders: whether the listing of a saved data set lies there."""
    if not is_remote(path):
        return os.path.isdir(path)
    if path.startswith("http") or glob.has_magic(path) or container_of(path):
        return False
    return any(_is_file(f"{path.rstrip('/')}/{listing}") for listing in (_DICT, _STATE))


def _is_file(path: str) -> bool:
    if not is_remote(path):
        return os.path.isfile(path)
    try:
        remote.state_of(path)
    except UserError:
        return False
    return True


def _saved_files(name: str, folder: str) -> list[str]:
    if _is_file(listing := f"{folder}/{_DICT}"):
        splits = _entries(name, listing, "splits")
        return [file for split in splits for file in _saved_files(name, f"{folder}/{split}")]
    if _is_file(listing := f"{folder}/{_STATE}"):
        # What else lies there, such as cache-*.arrow, is no part of the data set.
        return [f"{folder}/{entry['filename']}" for entry in _entries(name, listing, "_data_files")]
    raise UserError(
        f"source {name!r}: {shown(folder)} is a folder, but none that datasets.save_to_disk wrote (no {_STATE}, no "
        f"{_DICT}); name its files, such as {shown(folder)}/*.parquet"
    )


def _entries(name: str, listing: str, field: str) -> list[Any]:
    try:
        with closing(open_input(listing)) as file:
            entries = json.load(file)[field]
        if isinstance(entries, list) and all(
            isinstance(entry, str) or entry["filename"] for entry in entries
        ):
            return entries
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"source {name!r}: {shown(listing)}: no list {field!r} in it; save the data set again")
