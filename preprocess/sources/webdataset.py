"""webdataset tars: the members of one key (path up to the first dot of the name) are one sample.

    000000001.jpg  000000001.txt  000000001.json   ->   [image, caption]

The scan walks the tar headers, and reads captions and what the headers of pictures need; the pack then reads
single members by (offset, size) with `pread`. Pictures are read whole once, and a tar is shared by any number of
readers.
"""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from preprocess.config import SourceConfig
from preprocess.samples import RawSample, RawSegment, Reject
from shared.errors import UserError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

IMAGE_EXTENSIONS = frozenset(
    "jpg jpeg jpe jfif mpo png apng webp gif bmp tif tiff avif jp2 j2k ppm pgm ico heic heif".split()
)

# A text takes 120 times its size while it is tokenized (measured with a BPE of 8192): half a gigabyte.
MAX_CAPTION_BYTES = 4 << 20


@dataclass(slots=True)
class _Group:
    """The members of one key, by lower-case extension: (offset, size)."""

    key: str
    repeated: bool
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


class WebDataset:
    """A source of captioned images in plain tars (USTAR, PAX, GNU)."""

    def __init__(self, name: str, config: SourceConfig) -> None:
        self._name = name
        self._field = config.caption.partition(":")[2]
        self._caption = "json" if self._field else "txt"

    def scan(self, unit: str) -> Iterator[RawSample | Reject]:
        groups, damage = _read_headers(self._name, unit)
        for group in groups:
            yield self._sample(unit, group)
        if damage:
            yield self._reject(f"{os.path.basename(unit)}#rest", "archive_damaged", damage)

    def read_text(self, unit: str, offset: int, size: int) -> str:
        return self._text(self.read_bytes(unit, offset, size))

    def read_bytes(self, unit: str, offset: int, size: int) -> bytes:
        file = self._file(unit)
        pieces: list[bytes] = []
        end = offset + size
        while offset < end:  # one call returns at most 2 GiB
            pieces.append(os.pread(file.fileno(), end - offset, offset))
            if not pieces[-1]:
                raise UserError(
                    f"source {self._name!r}: {unit} is shorter than at the scan; set on_change = rebuild"
                )
            offset += len(pieces[-1])
        return b"".join(pieces)

    def _file(self, unit: str) -> io.FileIO:
        try:
            return _open(unit)
        except FileNotFoundError:
            raise UserError(f"source {self._name!r}: {unit} is gone since the scan; put it back") from None

    def _sample(self, unit: str, group: _Group) -> RawSample | Reject:
        if group.repeated:
            return self._reject(group.key, "duplicate_key", "the tar holds this key twice; the first is used")
        images = [place for name, place in group.members.items() if name in IMAGE_EXTENSIONS]
        if len(images) != 1:
            # A caption says nothing of which picture it belongs to.
            reason = "several_images" if images else "no_image"
            return self._reject(group.key, reason, f"members: {', '.join(group.members) or 'none'}")
        image = images[0]
        caption = group.members.get(self._caption)
        if caption is None:
            return self._reject(group.key, "no_caption", f"no .{self._caption} member")
        if caption[1] > MAX_CAPTION_BYTES:
            detail = f"{caption[1]} bytes, limit {MAX_CAPTION_BYTES}"
            return self._reject(group.key, "caption_too_many_bytes", detail)
        data = self.read_bytes(unit, *caption)
        try:
            text = self._text(data)
        except UnicodeError as error:
            return self._reject(group.key, "caption_not_utf8", str(error))
        except (ValueError, RecursionError) as error:  # ValueError: also an integer of too many digits
            return self._reject(group.key, "json_invalid", str(error))
        except KeyError as error:
            return self._reject(group.key, "no_caption", f"no text field {error} in the .json member")
        if not text.strip():
            return self._reject(group.key, "caption_empty", f"{caption[1]} bytes of white space")
        segments = (
            RawSegment(Span(self._file(unit), *image), *image),
            RawSegment(text, *caption),
        )
        return RawSample(group.key, segments)

    def _text(self, data: bytes) -> str:
        """The caption in a member's bytes, without a byte order mark and outer white space."""
        text = data.decode("utf-8-sig")
        if self._field:
            record = json.loads(text)
            value = record.get(self._field) if isinstance(record, dict) else None
            if not isinstance(value, str):
                raise KeyError(self._field)
            text = value
            # JSON escapes can spell lone surrogates, which no UTF-8 text holds.
            text.encode("utf-8")
        return text.strip()

    def _reject(self, key: str, reason: str, detail: str) -> Reject:
        return Reject(self._name, key, reason, detail)


def _read_headers(name: str, unit: str) -> tuple[list[_Group], str]:
    """Members grouped by key in order of first appearance, and what stopped the walk ("" at a proper end).

    Raises:
        UserError: the file is not a plain tar at all.
        OSError: it cannot be read now; the executor tries again.
    """
    groups: dict[str, _Group] = {}
    repeats: list[_Group] = []
    size = os.path.getsize(unit)
    try:
        with tarfile.open(unit, "r:") as tar:
            try:
                for member in tar:
                    if member.size < 0:  # a header that leads back to itself would never end
                        return [*groups.values(), *repeats], f"{member.name} has a size of {member.size}"
                    if member.isfile() and member.offset_data + member.size > size:
                        return [*groups.values(), *repeats], f"{member.name} is cut off at byte {size}"
                    _add_member(groups, repeats, member)
                damage = _what_follows(unit, tar.offset)
            except (tarfile.TarError, ValueError, EOFError) as error:
                damage = f"{type(error).__name__}: {error}"
    except tarfile.TarError as error:
        raise UserError(
            f"source {name!r}: {unit}: not a readable tar ({error}); compressed tars cannot be read by offset, "
            f"unpack them, or take the file out of sources.{name}.paths"
        ) from None
    return [*groups.values(), *repeats], damage


def _what_follows(unit: str, offset: int) -> str:
    """What is lost behind the archive's end at `offset`; "" when that is nothing.

    tarfile takes a header that it cannot read for the end, once there was a good one, and stops at a block of
    zeros, though another archive may have been appended to it. Other bytes behind the zeros are no members.
    """
    file, block = _open(unit).fileno(), b""
    position = offset
    while chunk := os.pread(file, 1 << 20, position):
        zeros = len(chunk) - len(chunk.lstrip(b"\0"))
        if zeros < len(chunk):
            position += zeros // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
            block = os.pread(file, tarfile.BLOCKSIZE, position)
            break
        position += len(chunk)
    if not block:
        return ""
    if position == offset:
        return f"no readable header at byte {offset}"
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return ""
    return f"another archive follows at byte {position}; unpack the tar and pack it again as one"


def _add_member(groups: dict[str, _Group], repeats: list[_Group], member: tarfile.TarInfo) -> None:
    folder, _, name = member.name.rpartition("/")
    stem, _, extension = name.partition(".")
    if not member.isfile() or not stem:  # links, folders, and hidden files such as ._x.jpg
        return
    # Names are bytes; keys are text in every table that follows.
    key = (f"{folder}/{stem}" if folder else stem).encode("utf-8", "backslashreplace").decode()
    group = groups.setdefault(key, _Group(key, repeated=False))
    if extension.lower() in group.members:
        if not repeats or repeats[-1].key != key or extension.lower() in repeats[-1].members:
            repeats.append(_Group(key, repeated=True))
        group = repeats[-1]
    group.members[extension.lower()] = (member.offset_data, member.size)


class Span(io.BufferedReader):
    """Bytes [offset, offset + size) of an open file as a file of their own; any number may share one file."""

    def __init__(self, file: io.FileIO, offset: int, size: int) -> None:
        super().__init__(_RawSpan(file, offset, size))
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


@lru_cache(maxsize=64)
def _open(unit: str) -> io.FileIO:
    """Open files of this process; one that drops out of the cache is closed. `pread` needs no position."""
    return io.FileIO(unit)
