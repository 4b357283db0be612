"""What a source hands to the scan, and what the scan keeps of it for the plan and the pack.

    source -> RawSample (texts, encoded pictures and videos, in document order)
    scan   -> IndexSegment (lengths, and the place of the bytes)

Only the scan talks to sources: it tokenizes every text once and keeps the tokens, and of pictures and videos it
keeps where their encoded bytes lie. What has no place of its own in a file (a value inside a compressed page) is
copied beside the index. Plan and pack know no input format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import BinaryIO, Literal

import numpy as np
import pyarrow as pa

TEXT, IMAGE, VIDEO = 0, 1, 2

# Reason of a picture that is left out because its source's config asks for no more.
OVER_MAX_IMAGES = "over_max_images"
# Reason of a part of a cut sample that nothing would be learned from, such as one of a user's words alone.
NO_LABELS = "no_labels"

# `file` of an IndexSegment: its bytes were copied to the store beside the index.
STORE = "store"


@dataclass(frozen=True, slots=True)
class Text:
    """Text of a sample.

    learned: character spans [start, end) whose tokens are learned; None learns all.
    special: character spans that are special tokens of the tokenizer, written by a chat template; whatever is
        outside of them stays text, also if it spells a special token.
    inner: something of the same text, such as a picture, precedes it (`TextTokenizer.inner`).
    """

    text: str
    learned: tuple[tuple[int, int], ...] | None = None
    special: tuple[tuple[int, int], ...] = ()
    inner: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes [offset, offset + size) of a file; `file` is a path or URI."""

    file: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Media:
    """An encoded picture or video. `file` is read only as far as somebody asks.

    place: where the pack pass finds the bytes again; None has the scan copy them into its store.
    """

    kind: Literal[1, 2]
    file: BinaryIO
    place: Place | None


@dataclass(frozen=True, slots=True)
class Missing:
    """A picture that the source names but cannot give; `reason` is counted."""

    reason: str
    detail: str


Segment = Text | Media | Missing


@dataclass(frozen=True, slots=True)
class RawSample:
    """One training document. `separator` joins texts that have nothing between them, or nothing any more."""

    key: str
    segments: tuple[Segment, ...]
    separator: str = ""


@dataclass(frozen=True, slots=True)
class Reject:
    """A sample, or a part or a picture of one, that is not trained on.

    part: -1 for all of the sample. media: which of its pictures and videos is lost from a sample that is trained on
    without it; -1 for a sample or a part. The scan numbers them as the source has them; the pack: among those that
    the scan kept.
    """

    source: str
    key: str
    reason: str
    detail: str
    part: int = -1
    media: int = -1


@dataclass(frozen=True, slots=True)
class IndexSegment:
    """One segment as plan and pack see it.

    file, offset, size: a text's tokens [offset, offset + tokens) in the token file of its unit (file and size
    are empty); a picture's bytes in `file`, which is a path, a URI or STORE.
    tokens: decoder tokens it takes, an image's begin and end token included. height, width: pixels as
    displayed. t, h, w: grid in patches after the resize. state: when a picture's file was last changed, where it is
    a file of its own on this machine (`inputs.change_time`). All 0 for what does not apply.
    """

    kind: int
    file: str
    offset: int
    size: int
    tokens: int
    height: int = 0
    width: int = 0
    t: int = 0
    h: int = 0
    w: int = 0
    state: int = 0

    @property
    def patches(self) -> int:
        return self.t * self.h * self.w


SEGMENT_TYPE = pa.struct(
    [
        pa.field("kind", pa.int8(), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        *(
            pa.field(name, pa.int32(), nullable=False)
            for name in ("tokens", "height", "width", "t", "h", "w")
        ),
        pa.field("state", pa.int64(), nullable=False),
    ]
)
SEGMENTS_TYPE = pa.list_(pa.field("element", SEGMENT_TYPE, nullable=False))

# One row per usable sample. key_hash: xxh3 of the key. content_hash: xxh3 of everything a sample is made from, 0
# where duplicates are not looked for.
INDEX_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("key_hash", pa.uint64(), nullable=False),
        pa.field("content_hash", pa.uint64(), nullable=False),
        pa.field("segments", SEGMENTS_TYPE, nullable=False),
    ]
)

REJECT_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("part", pa.int32(), nullable=False),
        pa.field("media", pa.int32(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)


segment_fields = attrgetter(*SEGMENT_TYPE.names)


def segments_column(samples: Sequence[Sequence[IndexSegment]]) -> pa.ListArray:
    """Segments of many samples as one Arrow column of type SEGMENTS_TYPE."""
    flat = [segment_fields(segment) for segments in samples for segment in segments]
    return fields_column(flat, [len(segments) for segments in samples])


def fields_column(flat: Sequence[tuple[int | str, ...]], lengths: Sequence[int]) -> pa.ListArray:
    """`segments_column` of the fields of all segments (`segment_fields`), `lengths` of them in each sample."""
    columns = list(zip(*flat, strict=True)) if flat else [() for _ in SEGMENT_TYPE]
    children = [pa.array(column, field.type) for column, field in zip(columns, SEGMENT_TYPE, strict=True)]
    struct = pa.StructArray.from_arrays(children, fields=list(SEGMENT_TYPE))
    offsets = np.cumsum([0, *lengths]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), struct, type=SEGMENTS_TYPE)


def reject_table(rejects: Sequence[Reject]) -> pa.Table:
    columns = {field.name: [getattr(reject, field.name) for reject in rejects] for field in REJECT_SCHEMA}
    return pa.table(columns, schema=REJECT_SCHEMA)
