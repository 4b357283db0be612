"""Files that are complete or absent.

Every output of every step is written under a temporary name beside its place, flushed to disk and renamed.
A file that exists under its own name is therefore whole, which is what "skip it, it is there" relies on.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from shared.errors import UserError

TEMPORARY = ".tmp"
LOCK = ".lock"


@contextmanager
def atomic_path(path: Path) -> Generator[Path, None, None]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on an exception.

    The name holds random digits, so that two attempts at one unit never write into one file, on whatever host.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, complete or absent."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, mend: str = "delete it and run again") -> Any:
    """The value of a JSON file that this program wrote.

    Raises:
        UserError: it is missing or damaged; `mend` is what the message tells the reader to do.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {mend}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); {mend}") from None


@contextmanager
def lock_directory(directory: Path, what: str) -> Generator[None, None, None]:
    """Hold a directory for this process; created if missing. Ends with the process, however it ends.

    Some network file systems lock within one host only, or not at all; on the latter this holds nothing.

    Raises:
        UserError: another process holds it, or it cannot be made; `what` is what is going on there.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"{directory}: cannot be made or written to ({error.strerror}); choose another"
        ) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(
            f"{directory}: another process is {what} there; wait for it, or choose another"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            os.close(handle)
            raise UserError(
                f"{directory / LOCK}: cannot be locked ({error.strerror}); choose another"
            ) from None
        logging.getLogger(__name__).warning("%s: no locks here; keep it to one process yourself", directory)
    try:
        yield
    finally:
        os.close(handle)


def remove_temporaries(directory: Path, pattern: str = "**/*") -> None:
    """Remove what killed attempts left behind. Only for a directory that nobody else is writing to."""
    for path in directory.glob(f"{pattern}{TEMPORARY}"):
        path.unlink(missing_ok=True)


def canonical_json(value: Any) -> bytes:
    """One byte string per value: sorted keys, no spaces. What fingerprints are made from."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def file_checksum(path: Path) -> str:
    """xxh3 of a whole file, 16 hex digits; 16 MiB of it in memory at a time."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def sha256(*chunks: bytes) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()
