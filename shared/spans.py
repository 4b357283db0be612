"""A part of a file, or an object of a store, as a file of its own."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class RawSpan(io.RawIOBase):
    """Bytes [offset, offset + size) of what `fill(view, position)` reads; it returns how many bytes it has written.

    Wrap it in a buffer: each read is a call.
    """

    def __init__(self, fill: Callable[[memoryview, int], int], offset: int, size: int, name: str) -> None:
        self._fill, self._offset, self._size, self._name = fill, offset, size, name
        self._position = 0

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
        count = self._fill(view, self._offset + self._position) if view else 0
        if view and not count:
            raise OSError(errno.EIO, "shorter than when its headers were read", self._name)
        self._position += count
        return count
