"""What a source hands to the scan and to the pack: segments, in document order.

A sample is an ordered list of segments, text or image. The scan turns each into an `IndexSegment`, which keeps
lengths and the place of the bytes but not the bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol

import pyarrow as pa

TEXT, IMAGE = 0, 1


@dataclass(frozen=True, slots=True)
class RawSegment:
    """`content` is text or an encoded image as a file, read only as far as somebody asks.

    (offset, size) finds it again in its unit.
    """

    content: str | BinaryIO
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class RawSample:
    key: str
    segments: tuple[RawSegment, ...]


@dataclass(frozen=True, slots=True)
class Reject:
    """A sample, or a part of one, that is not trained on. `part` is -1 for the whole sample."""

    source: str
    key: str
    reason: str
    detail: str
    part: int = -1


class Source(Protocol):
    """One input format. A unit is one raw file, the grain of the scan."""

    def scan(self, unit: str) -> Iterator[RawSample | Reject]:
        """Every sample of the unit, usable or not, in file order.

        Raises:
            UserError: the unit as a whole cannot be read.
        """
        ...

    def read_text(self, unit: str, offset: int, size: int) -> str: ...

    def read_bytes(self, unit: str, offset: int, size: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class IndexSegment:
    """One segment as the plan sees it.

    tokens: decoder tokens it takes, an image's begin and end token included. height, width: pixels as
    displayed. t, h, w: grid in patches after the resize. All 0 for what does not apply.
    """

    kind: int
    offset: int
    size: int
    tokens: int
    height: int = 0
    width: int = 0
    t: int = 0
    h: int = 0
    w: int = 0

    @property
    def patches(self) -> int:
        return self.t * self.h * self.w


SEGMENT_TYPE = pa.struct(
    [
        pa.field("kind", pa.int8(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        *(
            pa.field(name, pa.int32(), nullable=False)
            for name in ("tokens", "height", "width", "t", "h", "w")
        ),
    ]
)
SEGMENTS_TYPE = pa.list_(pa.field("element", SEGMENT_TYPE, nullable=False))

# One row per sample read; `reason` is empty for the usable ones.
INDEX_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
        pa.field("segments", SEGMENTS_TYPE, nullable=False),
    ]
)

REJECT_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("part", pa.int32(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)
