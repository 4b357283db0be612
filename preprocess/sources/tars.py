"""Tars as groups of members of one key: plain ones by their headers, compressed ones as a stream.

    plain     headers are walked, contents stay where they are     all members of a key, wherever they stand
    gzip      unpacked from first to last byte, once; wanted       members of a key that stand near each other
    zstd      contents are kept until their group is complete

A stream cannot wait for the rest of a key to its end: a group closes when WINDOW_KEYS other keys have begun behind
it, or when more than WINDOW_BYTES wait. What comes later of its key is a group of its own that says so. Memory is
the window, and some 70 bytes per key to know it again. A plain tar is listed whole, in 36 bytes and its key a member.
"""

from __future__ import annotations

import io
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, BinaryIO, cast

import pyarrow as pa
import xxhash

from preprocess.inputs import Local, open_input
from preprocess.sources.base import BadFileError
from preprocess.sources.record import is_damage
from preprocess.sources.tar_headers import BLOCK, plain_member
from preprocess.sources.tar_listing import Group, Listing, Member
from shared.remote import shown

# Tars are written key by key. 64 is for writers that run a few keys at a time; 256 MiB hold that many large pictures.
WINDOW_KEYS = 64
WINDOW_BYTES = 256 << 20
# Names and PAX records of one member; a damaged header may ask for any number of bytes.
MAX_HEADER_BYTES = 1 << 20
# Read at a time of a plain tar: the headers of a picture, its caption and its record in one go.
HEADER_BYTES = 4096
# Unpacked at a time: a damaged size may be any number.
PIECE_BYTES = 1 << 20

# Packed bytes given to zlib at a time, which hands back those that it has no room for.
_GZIP_BYTES = 4096
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


def compression_of(unit: str) -> str:
    """ "gzip", "zstd" or "" for a plain file, by its first bytes, whatever its name."""
    with closing(open_input(unit)) as file:
        magic = file.read(4)
    if magic.startswith(_GZIP):
        return "gzip"
    # 0x184D2A50 to 5F begin a frame to be skipped, with which some writers open.
    skipped = magic[1:] == b"\x2a\x4d\x18" and 0x50 <= magic[0] <= 0x5F
    return "zstd" if magic == _ZSTD or skipped else ""


def walk_plain(unit: str, file: Local) -> tuple[Iterator[Group], str]:
    """Groups in order of first appearance, then repeated ones; and what stopped the walk, "" at a proper end.

    `file` is the content of `unit` on this machine.

    Raises:
        BadFileError: it is not a tar at all.
        OSError: it cannot be read now; the executor tries again.
    """
    listing = Listing()
    with closing(_HeaderFile(file)) as headers:
        size = os.fstat(headers.fileno()).st_size
        tar = _open_tar(unit, headers)
        damage = ""
        while not damage and (member := _next_member(tar)) is not None:
            if isinstance(member, str):
                damage = member
            elif member.isfile() and member.offset_data + member.size > size:
                damage = f"{member.name} is cut off at byte {size}"
            else:
                if member.isfile() and (place := _place_of(member.name)):
                    # Without a place where its content is in pieces.
                    offset = -1 if member.issparse() else member.offset_data
                    listing.add(*place, offset, member.size)
                _list_plain(tar, headers, size, listing)
        return listing.groups(), damage or _what_follows(headers, tar.offset)


def _list_plain(tar: tarfile.TarFile, headers: _HeaderFile, size: int, listing: Listing) -> None:
    """List whole members of plain headers up to the first other one, where tarfile goes on; nearly a whole tar."""
    if tar.pax_headers:  # they hold for all members that follow
        return
    offset = tar.offset
    while member := plain_member(headers.header_at(offset)):
        name, length = member
        content = offset + BLOCK
        if content + length > size:
            break
        if place := _place_of(name):
            listing.add(*place, content, length)
        offset = content + -(-length // BLOCK) * BLOCK
    tar.offset = offset
    # Away from there: tarfile looks for the end of the content before it only if it has to move.
    headers.seek(0)


def walk_stream(unit: str, codec: str, wanted: Callable[[str], int]) -> Iterator[Group | str]:
    """Groups as they close, and last, where there is one, what stopped the walk.

    `wanted` says for an extension up to which size a content is kept.

    Raises:
        BadFileError: it holds no tar at all.
        OSError: it cannot be read now; the executor tries again.
    """
    with closing(open_input(unit)) as file:
        stream = _Stream(_Gunzip(file) if codec == "gzip" else _open_zstd(file))
        tar = _open_tar(unit, stream)
        window = _Window()
        damage = ""
        while not damage and (member := _next_member(tar)) is not None:
            if isinstance(member, str):
                damage = member
            elif member.isfile() and (place := _place_of(member.name)):
                content = Member(member.offset_data, member.size)
                if not member.issparse() and member.size <= wanted(place[1]):
                    content.data = stream.read_content(member.size)
                    if len(content.data) < member.size:
                        damage = stream.damage or f"{member.name} is cut off at byte {stream.tell()}"
                        break
                yield from window.add(*place, content, sparse=member.issparse())
        yield from window.close()
        if damage := stream.damage or damage or stream.what_follows():
            yield damage


class _Window:
    """Groups of a stream that are still open, in order of first appearance."""

    def __init__(self) -> None:
        self._open: dict[str, Group] = {}
        self._repeated: Group | None = None
        self._closed: set[int] = set()
        self._bytes = 0

    def add(self, key: str, extension: str, content: Member, *, sparse: bool) -> Iterator[Group]:
        """Take a member; yields what closes by it."""
        if key not in self._open:
            late = xxhash.xxh3_64_intdigest(key.encode()) in self._closed
            self._open[key] = Group(key, "late" if late else "")
        group = self._open[key]
        if extension in group.members:
            again = self._repeated
            if again is None or again.key != key or extension in again.members:
                if again is not None:
                    yield again
                self._repeated = again = Group(key, "repeated")
            group, content.data = again, None
        if not sparse:
            group.members[extension] = content
            self._bytes += len(content.data or b"")
        while len(self._open) > WINDOW_KEYS + 1 or (self._bytes > WINDOW_BYTES and len(self._open) > 1):
            yield self._close_first()

    def close(self) -> Iterator[Group]:
        while self._open:
            yield self._close_first()
        if self._repeated is not None:
            yield self._repeated

    def _close_first(self) -> Group:
        group = self._open.pop(next(iter(self._open)))
        self._closed.add(xxhash.xxh3_64_intdigest(group.key.encode()))
        self._bytes -= sum(len(member.data or b"") for member in group.members.values())
        return group


class _HeaderFile(io.BufferedReader):
    """A tar of which headers are read."""

    def __init__(self, file: Local) -> None:
        raw = io.FileIO(file if isinstance(file, str) else os.dup(file.fileno()))
        super().__init__(raw, HEADER_BYTES)

    def header_at(self, offset: int) -> bytes:
        super().seek(offset)
        return super().read(BLOCK)

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(_header_bytes(size))


def _open_zstd(file: BinaryIO) -> pa.NativeFile:
    """Of a damaged frame up to 1 MiB before the fault is lost, which Arrow unpacks at a time; of a cut one nothing."""
    return pa.CompressedInputStream(pa.PythonFile(cast(Any, file), "r"), "zstd")


class _Gunzip:
    """gzip members, one behind another, unpacked as far as somebody reads: what precedes a fault is not lost to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._packed = file, b""
        self._member = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, none at the end.

        Raises:
            zlib.error: it is damaged.
            OSError: it is cut off, or cannot be read now.
        """
        while True:
            if self._member.eof:
                self._packed = self._member.unused_data or self._file.read(_GZIP_BYTES)
                if not self._packed:
                    return b""
                self._member = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
            packed = self._packed or self._file.read(_GZIP_BYTES)
            piece = self._member.decompress(packed, size)
            self._packed = self._member.unconsumed_tail
            if piece:
                return piece
            if not packed and not self._member.eof:
                raise OSError("the stream is cut off")


class _Stream:
    """What is unpacked of a compressed file, as tarfile wants a file: it reads on, and seeks what lies ahead.

    Reads end where a header or a content ends: what a damaged one loses could not be used. Damage is an end that
    `damage` explains.
    """

    def __init__(self, stream: _Gunzip | pa.NativeFile) -> None:
        self._stream, self._position = stream, 0
        self.damage = ""
        self.last = b""

    def read(self, size: int | None = -1, /) -> bytes:
        """Bytes of headers."""
        self.last = self.read_content(_header_bytes(size))
        return self.last

    def read_content(self, size: int) -> bytes:
        """The next bytes; fewer at the end."""
        pieces: list[bytes] = []
        while size and (piece := self._read_on(size)):
            pieces.append(piece)
            size -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = io.SEEK_SET, /) -> int:
        if whence != io.SEEK_SET or position < self._position:
            raise tarfile.ReadError(f"a header leads back from byte {self._position} to {position}")
        while self._position < position and self._read_on(position - self._position):
            pass
        return self._position

    def what_follows(self) -> str:
        """What is lost behind the end of the archive; reads the stream to its end, where its checksum is."""
        block = self.last
        if block.strip(b"\0"):
            return self.damage or f"no readable header at byte {self._position - len(block)}"
        while (block := self.read_content(tarfile.BLOCKSIZE)) and not block.strip(b"\0"):
            pass
        fault = _archive_at(block, self._position - len(block))
        while not fault and self._read_on(PIECE_BYTES):
            pass
        return fault or self.damage

    def _read_on(self, size: int) -> bytes:
        if self.damage:
            return b""
        try:
            piece = self._stream.read(min(size, PIECE_BYTES))
        except (OSError, zlib.error, pa.ArrowException) as error:
            if not is_damage(error):
                raise
            self.damage = f"{error} after {self._position} bytes"
            return b""
        self._position += len(piece)
        return piece


def _header_bytes(size: int | None) -> int:
    if size is None or not 0 <= size <= MAX_HEADER_BYTES:
        raise tarfile.ReadError(f"a header of {size} bytes, limit {MAX_HEADER_BYTES}")
    return size


def _open_tar(unit: str, file: _HeaderFile | _Stream) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=cast(Any, file), mode="r:")
    except (tarfile.TarError, ValueError, EOFError) as error:
        fault = (file.damage if isinstance(file, _Stream) else "") or str(error)
        raise BadFileError(
            "file_unreadable",
            f"{shown(unit)}: not a readable tar ({fault}), plain or packed with gzip or zstd; get it again",
        ) from None


def _next_member(tar: tarfile.TarFile) -> tarfile.TarInfo | str | None:
    """The next member, None at the end, or what is wrong with its header."""
    try:
        member = tar.next()
    except (tarfile.TarError, ValueError, EOFError) as error:
        return f"{type(error).__name__}: {error}"
    cast(Any, tar).members.clear()  # it keeps every member it has seen
    if member is not None and member.size < 0:  # a header that leads back to itself would never end
        return f"{member.name} has a size of {member.size}"
    return member


def _place_of(path: str) -> tuple[str, str] | None:
    """Key and lower-case extension of a file; None for what is no member of a sample, hidden files such as ._x.jpg."""
    folder, _, name = path.rpartition("/")
    stem, _, extension = name.partition(".")
    if not stem:
        return None
    # Names are bytes; keys are text in every table that follows.
    key = f"{folder}/{stem}" if folder else stem
    if not key.isascii():
        key = key.encode("utf-8", "backslashreplace").decode()
    return key, extension.lower()


def _what_follows(file: _HeaderFile, offset: int) -> str:
    """What is lost behind the archive's end at `offset`; "" when that is nothing.

    tarfile takes a header that it cannot read for the end, once there was a good one, and stops at a block of
    zeros, though another archive may have been appended to it. Other bytes behind the zeros are no members.
    """
    position = file.seek(offset)
    while chunk := file.read(MAX_HEADER_BYTES):
        zeros = len(chunk) - len(chunk.lstrip(b"\0"))
        if zeros < len(chunk):
            position = file.seek(position + zeros // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE)
            if position == offset:
                return f"no readable header at byte {offset}"
            return _archive_at(file.read(tarfile.BLOCKSIZE), position)
        position += len(chunk)
    return ""


def _archive_at(block: bytes, position: int) -> str:
    if not block:
        return ""
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return ""
    return f"another archive follows at byte {position}; unpack the tar and pack it again as one"
