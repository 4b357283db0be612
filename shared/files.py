"""Files that are complete or absent, on this machine or in a store.

Every output of every step is written under a temporary name beside its place, flushed to disk and renamed; one that
goes to a store is written to a temporary file of this machine and copied there, where it appears when all of it has
arrived. A file that exists under its own name is therefore whole, which is what "skip it, it is there" relies on.

A path is a `pathlib.Path`, or a `UPath` for a URI (`shared.remote.as_path`): both have the same arithmetic of names,
and the functions here do the rest on either.
"""

from __future__ import annotations

import errno
import fcntl
import fnmatch
import hashlib
import json
import logging
import os
import resource
import secrets
import shutil
import tempfile
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from shared import remote
from shared.errors import UserError
from shared.remote import is_remote, shown
from shared.remote_lock import lock_object

TEMPORARY = ".tmp"
# Errors that only a write ends in, and that do not name its file.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOCK = ".lock"
# One request of a reader that jumps, as Parquet's do.
REQUEST_BYTES = 256 << 10


@contextmanager
def atomic_path(path: Path) -> Generator[Path, None, None]:
    """Yield a temporary path of this machine; it becomes `path` on success and goes on an exception.

    Beside `path` its name holds random digits, so that two attempts at one unit never write into one file, on
    whatever host. For a store it lies where temporary files do (TMPDIR).
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="parquetry-") as directory:
            temporary = Path(directory) / path.name
            yield temporary
            if not temporary.exists():
                raise FileNotFoundError(errno.ENOENT, "nothing was written", shown(path))
            remote.write_file(temporary, str(path))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None and error.errno in FULL:
            error.filename = str(path)
        raise
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
        return json.loads(_read_bytes(path).decode("utf-8"))
    except OSError as error:
        raise UserError(f"{shown(path)}: cannot be read ({error.strerror}); {mend}") from None
    except ValueError as error:
        raise UserError(f"{shown(path)}: not valid JSON ({error}); {mend}") from None


def _read_bytes(path: Path) -> bytes:
    if not is_remote(path):
        return path.read_bytes()
    if (data := remote.read_bytes(str(path))) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), shown(path))
    return data


def open_file(path: Path) -> BinaryIO:
    """A file to read, here and there.

    Raises:
        FileNotFoundError: there is none.
    """
    if not is_remote(path):
        return open(path, "rb")
    if remote.size_of(str(path)) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), shown(path))
    return remote.open_object(str(path), REQUEST_BYTES)


def read_part(path: Path, start: int, end: int) -> bytes:
    """Bytes [start, end) of a file, fewer where it is shorter."""
    if is_remote(path):
        return remote.read_range(str(path), start, end - start)
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(end - start)


def file_size(path: Path) -> int | None:
    """Bytes of a file; None where there is none."""
    if is_remote(path):
        return remote.size_of(str(path))
    return path.stat().st_size if path.is_file() else None


def exists(path: Path) -> bool:
    return file_size(path) is not None


def existing(paths: Iterable[Path]) -> set[Path]:
    """Those of many files that exist; a store is asked once per directory."""
    listed: dict[str, dict[str, int]] = {}
    found: set[Path] = set()
    for path in paths:
        if not is_remote(path):
            found.update([path] if path.is_file() else [])
            continue
        directory = str(path.parent)
        if directory not in listed:
            listed[directory] = remote.list_below(directory)
        found.update([path] if str(path) in listed[directory] else [])
    return found


def list_files(directory: Path, pattern: str) -> list[Path]:
    """The files of a directory whose names match, sorted; none where there is no directory."""
    if not is_remote(directory):
        return sorted(path for path in directory.glob(pattern) if path.is_file())
    prefix = f"{directory}/"
    names = (uri.removeprefix(prefix) for uri in remote.list_below(str(directory)))
    return [
        directory / name for name in sorted(names) if "/" not in name and fnmatch.fnmatchcase(name, pattern)
    ]


def list_tree(directory: Path) -> list[str]:
    """All files below a directory, relative to it, sorted; none where there is none."""
    if is_remote(directory):
        prefix = f"{directory}/"
        return sorted(uri.removeprefix(prefix) for uri in remote.list_below(str(directory)))
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def remove(path: Path) -> None:
    """Remove a file, which need not be there."""
    if is_remote(path):
        remote.remove(str(path))
    else:
        path.unlink(missing_ok=True)


def remove_tree(directory: Path) -> None:
    """Remove a directory with all that is in it; it need not be there.

    Raises:
        UserError: something of it cannot be removed, or it is a link.
    """
    if not is_remote(directory):
        try:
            shutil.rmtree(directory)
        except FileNotFoundError:
            if directory.exists():
                raise
        except OSError as error:
            raise UserError(
                f"{error.filename or directory}: cannot be removed ({error.strerror or error}); remove "
                f"{directory} yourself and run again"
            ) from None
        return
    remote.remove_below(str(directory))


@contextmanager
def lock_directory(directory: Path, what: str) -> Generator[None, None, None]:
    """Hold a directory for this process; created if missing. Ends with the process, however it ends.

    Some network file systems lock within one host only, or not at all; on the latter this holds nothing. For what
    a lock in a store is worth, see `shared.remote_lock`.

    Raises:
        UserError: another process holds it, or it cannot be made; `what` is what is going on there.
    """
    if is_remote(directory):
        remote.require_writable(directory)
        with lock_object(f"{directory}/{LOCK}", what):
            yield
        return
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
    """Remove what killed attempts left behind. Only for a directory that nobody else is writing to.

    In a store they leave nothing behind that can be seen.
    """
    if is_remote(directory):
        return
    for path in directory.glob(f"{pattern}{TEMPORARY}"):
        path.unlink(missing_ok=True)


def allow_open_files(needed: int) -> int | None:
    """Raise this process's soft limit of open files where it is below `needed`; the hard limit if that is too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return None
    if hard != resource.RLIM_INFINITY and hard < needed:
        return hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return None


def canonical_json(value: Any) -> bytes:
    """One byte string per value: sorted keys, no spaces. What fingerprints are made from."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def file_checksum(path: Path) -> str:
    """xxh3 of a whole file, 16 hex digits; 16 MiB of it in memory at a time."""
    digest = xxhash.xxh3_64()
    with open_file(path) as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def sha256(*chunks: bytes) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()
