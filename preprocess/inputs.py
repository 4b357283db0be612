"""Raw files: patterns, ranges of bytes, and what tells that a file has changed."""

from __future__ import annotations

import errno
import glob
import gzip
import io
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from shared.errors import UserError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


def expand_paths(name: str, paths: Sequence[str]) -> list[str]:
    """The files that paths and patterns name, sorted, each once.

    Raises:
        UserError: a path does not exist or a pattern matches nothing; `name` is the source whose paths these are.
    """
    files: set[str] = set()
    for path in paths:
        found = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else [path]
        if not found:
            raise UserError(
                f"source {name!r}: pattern {path!r} matches no file; correct sources.{name}.paths"
            )
        for entry in found:
            if not Path(entry).is_file():
                raise UserError(f"source {name!r}: {entry}: no such file; correct sources.{name}.paths")
            files.add(entry)
    return sorted(files)


def file_state(path: str) -> list[int | str]:
    """Size and time of change: what differs when a file was written again."""
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns]


def open_input(path: str) -> BinaryIO:
    """A raw file, to be read from its start."""
    return open(path, "rb")


def open_stream(path: str) -> BinaryIO:
    """A raw file's content from its start, decompressed if its name ends in .gz or .zst; not seekable then."""
    file = open_input(path)
    if path.endswith((".gz", ".tgz")):
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    if path.endswith(".zst"):
        import zstandard

        return cast(
            BinaryIO, zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True, closefd=True)
        )
    return file


def read_range(path: str, offset: int, size: int) -> bytes:
    """Bytes [offset, offset + size) of a raw file; any number of readers may share it.

    Raises:
        UserError: the file is gone or has become shorter.
    """
    pieces: list[bytes] = []
    end = offset + size
    while offset < end:  # one call returns at most 2 GiB
        pieces.append(os.pread(open_cached(path).fileno(), end - offset, offset))
        if not pieces[-1]:
            raise UserError(f"{path} is shorter than at the scan; run again with --on_change rebuild")
        offset += len(pieces[-1])
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def open_cached(path: str) -> io.FileIO:
    """An open file of this process that is shared: only for `pread`, which needs no position.

    Raises:
        UserError: it is gone.
    """
    try:
        return _open_cached(path)
    except FileNotFoundError:
        raise UserError(f"{path} is gone since the scan; put it back") from None


@lru_cache(maxsize=64)
def _open_cached(path: str) -> io.FileIO:
    """One that drops out of the cache is closed when its last reader lets it go."""
    return io.FileIO(path)


class Span(io.BufferedReader):
    """Bytes [offset, offset + size) of a raw file as a file of their own, read when asked for."""

    def __init__(self, path: str, offset: int, size: int) -> None:
        super().__init__(_RawSpan(open_cached(path), offset, size))
        self._size = size

    def read(self, size: int | None = -1, /) -> bytes:
        # A damaged header may ask for more than there is memory, which would be taken before it is read.
        return super().read(size if size is None else min(size, self._size))


class _RawSpan(io.RawIOBase):
    def __init__(self, file: io.FileIO, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._position = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        position = offset + (0, self._position, self._size)[whence]
        if position < 0:
            raise ValueError(f"negative position {position}")
        self._position = position
        return position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer)[: max(0, self._size - self._position)]
        count = os.preadv(self._file.fileno(), [view], self._offset + self._position) if view else 0
        if view and not count:
            raise OSError(errno.EIO, "shorter than when its headers were read", str(self._file.name))
        self._position += count
        return count
