"""Read one Parquet page header: just enough Thrift (compact protocol) to prove a shard's layout.

The footer says where a column chunk lies but not how many pages it has; only the page headers in front of the
data do. Reference: the Parquet format's `parquet.thrift` (PageHeader, DataPageHeader) and the Thrift compact
protocol specification.
"""

from __future__ import annotations

from dataclasses import dataclass

DATA_PAGE = 0
PLAIN = 0

_BOOLEANS = (1, 2)
_BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 3, 4, 5, 6, 7, 8, 9, 10, 12


@dataclass(frozen=True, slots=True)
class PageHeader:
    """A data page: `header_bytes` of header, then `payload_bytes` of values and levels."""

    kind: int
    header_bytes: int
    payload_bytes: int
    crc: int | None
    num_values: int
    encoding: int
    # -1 where the header does not say.
    unpacked_bytes: int = -1


def read_page_header(data: memoryview, offset: int) -> PageHeader:
    """Parse the page header at `offset`.

    Raises:
        ValueError: the bytes there are not a page header.
    """
    reader = _CompactReader(data, offset)
    try:
        fields = reader.struct()
    except (IndexError, RecursionError):
        raise ValueError(f"no page header at byte {offset}") from None
    details = fields.get(5)
    if not isinstance(fields.get(1), int) or not isinstance(fields.get(3), int):
        raise ValueError(f"no page header at byte {offset}")
    values = details if isinstance(details, dict) else {}
    return PageHeader(
        kind=int(fields[1]),  # pyright: ignore[reportArgumentType]  # checked to be an int above
        header_bytes=reader.position - offset,
        payload_bytes=int(fields[3]),  # pyright: ignore[reportArgumentType]  # checked to be an int above
        crc=crc & 0xFFFFFFFF if isinstance(crc := fields.get(4), int) else None,
        num_values=_int(values.get(1)),
        encoding=_int(values.get(2)),
        unpacked_bytes=_int(fields.get(2)),
    )


def _int(value: object) -> int:
    return value if isinstance(value, int) else -1


class _CompactReader:
    """Structs, integers, binaries and lists of the compact protocol; everything else is skipped over."""

    def __init__(self, data: memoryview, position: int) -> None:
        self._data = data
        self.position = position

    def struct(self) -> dict[int, object]:
        fields: dict[int, object] = {}
        identifier = 0
        while (byte := self._byte()) != 0:
            delta, kind = byte >> 4, byte & 0x0F
            identifier = identifier + delta if delta else self._zigzag()
            fields[identifier] = self._value(kind)
        return fields

    def _value(self, kind: int) -> object:
        if kind in _BOOLEANS:
            return int(kind == 1)
        if kind in (_I16, _I32, _I64):
            return self._zigzag()
        if kind == _STRUCT:
            return self.struct()
        if kind == _BINARY:
            return self._skip(self._varint())
        if kind == _BYTE:
            return self._skip(1)
        if kind == _DOUBLE:
            return self._skip(8)
        if kind in (_LIST, _SET):
            head = self._byte()
            count = head >> 4 if head >> 4 != 15 else self._varint()
            return [self._element(head & 0x0F) for _ in range(count)]
        raise IndexError(f"thrift type {kind}")

    def _element(self, kind: int) -> object:
        # A boolean field is its own type and takes no byte; inside a list it takes one. Every element takes at
        # least one, so that a count from garbage ends with the data.
        return self._byte() if kind in _BOOLEANS else self._value(kind)

    def _skip(self, count: int) -> None:
        self.position += count
        if self.position > len(self._data):
            raise IndexError("past the end")

    def _byte(self) -> int:
        self.position += 1
        return self._data[self.position - 1]

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 64, 7):
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise IndexError("an integer of more than 64 bits")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
