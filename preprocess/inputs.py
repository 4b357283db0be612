"""Raw files, on this machine or in a store: patterns, ranges of bytes, and what tells that a file has changed.

A path is local, or a URI (`shared.remote`). Files of this machine are read with `pread`, so that any number of
readers share one descriptor; objects are read by range, one request each, several at a time where many are asked
for. Nothing is cached: a scan reads a file once from its start, and a pack asks for each picture once.
"""

from __future__ import annotations

import glob
import io
import os
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO, TypeVar

from preprocess.samples import Place
from shared import remote
from shared.errors import UserError
from shared.remote import is_remote, shown
from shared.spans import RawSpan

T = TypeVar("T")
Read = Callable[[Place], bytes]
# A path, or an open file that has none.
Local = str | io.FileIO

# Requests under way at a time, and not more than a store's client keeps connections for. A picture of 100 KB
# takes 20 to 100 ms to arrive, nearly all of it waiting.
REQUESTS = 32
# Where an object is read from its start: a request per this much.
STREAM_BYTES = 4 << 20


def expand_paths(name: str, paths: Sequence[str]) -> list[str]:
    """The files that paths, URIs and patterns of both name, sorted, each once.

    Raises:
        UserError: a path does not exist or a pattern matches nothing; `name` is the source whose paths these are.
    """
    return expand_paths_of(f"source {name!r}", f"sources.{name}.paths", paths)


def expand_paths_of(owner: str, key: str, paths: Sequence[str]) -> list[str]:
    """As `expand_paths`, for paths of any owner; messages begin with it and say to correct `key` of the config."""
    files: set[str] = set()
    for path in paths:
        found = _matches(owner, key, path)
        if not found:
            raise UserError(f"{owner}: pattern {shown(path)!r} matches no file; correct {key}")
        files.update(found)
    return sorted(files)


def _matches(owner: str, key: str, path: str) -> list[str]:
    if is_remote(path):
        signed = path.startswith("http") and "*" not in path.partition("?")[0]
        try:
            if not signed and glob.has_magic(path):
                return remote.find(path)
            remote.state_of(path)
        except UserError as error:
            raise UserError(f"{owner}: {error} ({key})") from None
        return [path]
    found = [path]
    if glob.has_magic(path) and not Path(path).is_file():  # names may hold brackets
        found = [entry for entry in glob.glob(path, recursive=True) if not os.path.isdir(entry)]
    for entry in found:
        if not _is_text(entry):
            raise UserError(f"{owner}: {entry!r}: its name is not UTF-8, which keys must be; rename it")
        if not Path(entry).is_file():
            raise UserError(f"{owner}: {entry}: no such file; correct {key}")
    return [str(Path(entry)) for entry in found]  # without ./ and //, so that each is read once


def _is_text(name: str) -> bool:
    """Whether all bytes of a file's name are UTF-8; Python has surrogates for those that are not."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def file_states(paths: Sequence[str]) -> list[list[int | str]]:
    """Size and time of change of each, or what a store tells instead: what differs when a file was written again."""
    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(file_state, paths))


def file_state(path: str) -> list[int | str]:
    if is_remote(path):
        state = remote.state_of(path)
        return [state.size, state.version]
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns]


def change_time(path: str) -> int:
    """Nanoseconds; 0 for an object of a store, which would have to be asked for each picture.

    Raises:
        UserError: it is gone.
    """
    try:
        return 0 if is_remote(path) else os.stat(path).st_mtime_ns
    except FileNotFoundError:
        raise UserError(f"{path} is gone since the scan; put it back") from None


def open_input(path: str) -> BinaryIO:
    """A raw file, to be read from its start; seekable."""
    if not is_remote(path):
        return open(path, "rb")
    return remote.open_object(path, STREAM_BYTES)


def local_copy(path: str) -> Local:
    """The content of a raw file on this machine: the path itself, or a copy without a name, gone with its last reader.

    For what is read more than once, from here and there. Copies lie where temporary files do (TMPDIR).
    """
    if not is_remote(path):
        return path
    file = tempfile.TemporaryFile(buffering=0)
    remote.download(path, file.fileno())
    return file


def read_range(path: Local, offset: int, size: int) -> bytes:
    """Bytes [offset, offset + size) of a raw file or a copy; any number of readers may share it.

    Raises:
        UserError: the file is gone or has become shorter.
        OSError: it cannot be read now; the executor tries again.
    """
    if isinstance(path, str) and is_remote(path):
        data = remote.read_range(path, offset, size)
        if len(data) != size:
            raise _shrunk(path)
        return data
    pieces: list[bytes] = []
    end = offset + size
    while offset < end:  # one call returns at most 2 GiB
        file = _opened(path)
        with _named(path):
            pieces.append(os.pread(file.fileno(), end - offset, offset))
        if not pieces[-1]:
            raise _shrunk(path)
        offset += len(pieces[-1])
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _shrunk(path: Local) -> UserError:
    return UserError(
        f"{shown(str(path))} is shorter than at the scan; put it back, or throw the index away: "
        "delete index/, plan/ and shards/ in the output and run again"
    )


def read_ahead(items: Iterable[T], places: Callable[[T], Sequence[Place]]) -> Iterator[tuple[T, Read]]:
    """Each item, with a function that reads its places: those in stores are asked for while the item before is
    worked on, so that their latency hides. At most the bytes of two items are held.

    Places on this machine are read when asked for: the kernel reads ahead by itself.
    """
    pool: ThreadPoolExecutor | None = None

    def begin(item: T) -> dict[Place, Future[bytes]]:
        nonlocal pool
        distant = {place for place in places(item) if is_remote(place.file)}
        if distant and pool is None:
            pool = ThreadPoolExecutor(REQUESTS)
        return {place: pool.submit(read_range, *_parts(place)) for place in distant} if pool else {}

    waiting: tuple[T, dict[Place, Future[bytes]]] | None = None
    try:
        for item in items:
            following = (item, begin(item))
            if waiting:
                yield waiting[0], _reader(waiting[1])
            waiting = following
        if waiting:
            yield waiting[0], _reader(waiting[1])
    finally:
        if pool:
            pool.shutdown(wait=False, cancel_futures=True)


def _reader(fetched: dict[Place, Future[bytes]]) -> Read:
    def read(place: Place) -> bytes:
        future = fetched.get(place)
        return future.result() if future else read_range(*_parts(place))

    return read


def _parts(place: Place) -> tuple[str, int, int]:
    return place.file, place.offset, place.size


def _opened(path: Local) -> io.FileIO:
    return open_cached(path) if isinstance(path, str) else path


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

    def __init__(self, path: Local, offset: int, size: int) -> None:
        super().__init__(RawSpan(partial(_read_into, path), offset, size, shown(str(path))))
        self._place = path, offset, size
        self._size = size

    def whole(self) -> bytes:
        """All of it, in one call where `read` takes two."""
        return read_range(*self._place)

    def read(self, size: int | None = -1, /) -> bytes:
        # A damaged header may ask for more than there is memory, which would be taken before it is read.
        return super().read(size if size is None else min(size, self._size))


def _read_into(path: Local, view: memoryview, offset: int) -> int:
    if isinstance(path, str) and is_remote(path):
        return remote.read_into(path, view, offset)
    file = _opened(path)  # not kept: a batch of samples may name thousands of files
    with _named(path):
        return os.preadv(file.fileno(), [view], offset)


@contextmanager
def _named(path: Local) -> Generator[None, None, None]:
    """An error of a call that knows only a descriptor names its file."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise
