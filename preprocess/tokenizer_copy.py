"""A tokenizer that lies in a store: its files on this machine, in every process that needs them.

The job's process lists and hashes them once; what a worker copies later has to have the same hashes, so that a
tokenizer that is replaced meanwhile stops the job and does not divide it.
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePath
from typing import IO, Any

from preprocess.scan import ScanUnit, scan_unit
from shared import remote
from shared.errors import UserError
from shared.files import list_tree, sha256
from shared.remote import as_path, shown
from shared.tokens import TEMPLATE_FILES, TOKENIZER_FILES

PREFIX = "parquetry-tokenizer-"
# In the directory of a copy; locked as long as the process that made it lives.
LOCK = ".lock"

# The directories of copies, which go with the process, and their locks.
_kept: list[tuple[tempfile.TemporaryDirectory[str], IO[bytes]]] = []


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """Files of a directory in a store: names relative to it, each with the sha256 of its content."""

    uri: str
    hashes: tuple[tuple[str, str], ...]


def find_tokenizer(uri: str, templates: Sequence[str]) -> TokenizerFiles:
    """The files there that belong to a tokenizer; `templates` are names of more that have to be there.

    Raises:
        UserError: one of them is not there, or the store gives no list.
    """
    if uri.startswith(("http://", "https://")):
        raise UserError(f"tokenizer {shown(uri)}: a web server has no list of its files; download it")
    uri = str(as_path(uri))
    names = list_tree(as_path(uri))
    if missing := [name for name in (*TOKENIZER_FILES, *templates) if name not in names]:
        raise UserError(
            f"tokenizer {shown(uri)}: no {missing[0]}; expected a directory with {' and '.join(TOKENIZER_FILES)}"
        )
    wanted = [name for name in names if name in (*TOKENIZER_FILES, *templates) or _is_template(name)]
    return TokenizerFiles(uri, tuple((name, sha256(_read(uri, name))) for name in wanted))


@lru_cache(maxsize=4)
def copy_tokenizer(files: TokenizerFiles) -> Path:
    """The directory of a copy on this machine, made once per process.

    Raises:
        UserError: a file is not what it was when the job began.
    """
    _remove_orphans()
    directory = _private_directory()
    for name, expected in files.hashes:
        content = _read(files.uri, name)
        if sha256(content) != expected:
            raise UserError(
                f"tokenizer {shown(files.uri)}: {name} has changed since the job began; give the same command again"
            )
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return directory


def scan_with_copy(files: TokenizerFiles, task: ScanUnit) -> dict[str, Any]:
    """`scan_unit`, on a worker that has no tokenizer yet."""
    return scan_unit(replace(task, tokenizer=copy_tokenizer(files)))


def _private_directory() -> Path:
    directory = tempfile.TemporaryDirectory(prefix=PREFIX)
    new = Path(directory.name) / "new"
    lock = open(new, "wb")
    fcntl.flock(lock, fcntl.LOCK_EX)
    new.rename(new.with_name(LOCK))  # so that none is ever there that is not locked
    _kept.append((directory, lock))
    return Path(directory.name)


def _remove_orphans() -> None:
    """Copies of processes that were killed, as Ray's workers are when a job ends: nothing else removes them."""
    for directory in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError), open(directory / LOCK, "rb") as lock:  # it is locked, another user's, or gone
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)


def _is_template(name: str) -> bool:
    # Without depth: a * of TEMPLATE_FILES stands for no slash.
    return any(
        PurePath(name).match(pattern) and name.count("/") == pattern.count("/") for pattern in TEMPLATE_FILES
    )


def _read(uri: str, name: str) -> bytes:
    if (content := remote.read_bytes(f"{uri}/{name}")) is None:
        raise UserError(
            f"tokenizer {shown(uri)}: {name} is gone; put it back and give the same command again"
        )
    return content
