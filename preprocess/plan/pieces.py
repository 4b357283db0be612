"""Pieces: samples, cut where one is longer than a pack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from preprocess.packing import surely_fit
from preprocess.plan.files import Ints
from preprocess.plan.survey import sample_tokens, segment_offsets
from preprocess.samples import SEGMENT_TYPE, SEGMENTS_TYPE, TEXT, IndexSegment, Reject
from preprocess.stream import Part, split_sample
from shared.arrays import runs
from shared.geometry import Budget
from shared.tokens import TokenIds


@dataclass(slots=True)
class Samples:
    """Rows of the index. `unit_n`: number of the unit among those of the window; `row_n`: of the row in its index.

    `copy_n`: which use of the sample.
    """

    key: pa.Array
    segments: pa.ListArray
    unit_n: npt.NDArray[np.int32]
    row_n: npt.NDArray[np.int32]
    copy_n: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.unit_n)


@dataclass(slots=True)
class Pieces:
    """Columns over pieces; `sample` is a row of `Samples`, `start` and `end` count tokens of its stream of `length`."""

    sample: Ints
    part: Ints
    parts: Ints
    start: Ints
    end: Ints
    length: Ints
    first_image: Ints
    last_image: Ints

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def num_images(self) -> Ints:
        return self.last_image - self.first_image

    def take(self, chosen: Ints) -> Pieces:
        return Pieces(*(getattr(self, column.name)[chosen] for column in fields(self)))


def sample_images(segments: pa.ListArray) -> tuple[Ints, Ints]:
    """First image of every sample [samples + 1], and the patches of every image."""
    offsets, flat = segment_offsets(segments), segments.flatten()
    is_image = flat.field("kind").to_numpy() != TEXT
    t, h, w = (flat.field(name).to_numpy().astype(np.int64)[is_image] for name in ("t", "h", "w"))
    return np.concatenate([[0], np.cumsum(is_image)])[offsets], t * h * w


def cut_into_pieces(
    samples: Samples,
    sources: list[str],
    too_long: Mapping[str, Literal["split", "reject"]],
    budget: Budget,
    ids: TokenIds,
    images_per_row: int,
) -> tuple[Pieces, list[tuple[int, Reject]]]:
    """Pieces of all samples, and the samples of which there are none. `sources`: the source of each unit.

    Samples that surely fit one pack are handled as columns, the rest one by one.
    """
    length = sample_tokens(samples.segments, ids)
    image_start, patches = sample_images(samples.segments)
    num_images = np.diff(image_start)
    fits = surely_fit(length, image_start, patches, budget, images_per_row)
    whole, others = np.flatnonzero(fits), np.flatnonzero(~fits)
    zeros = np.zeros_like(whole)
    columns = [
        np.stack([whole, zeros, zeros + 1, zeros, length[whole], length[whole], zeros, num_images[whole]])
    ]
    rejects: list[tuple[int, Reject]] = []
    for sample, segments in zip(others.tolist(), segments_of(samples, others), strict=True):
        source = sources[samples.unit_n[sample]]
        verdict = split_sample(segments, ids, budget, images_per_row)
        if isinstance(verdict, list) and len(verdict) > 1 and too_long[source] == "reject":
            verdict = "S" if length[sample] > budget.S else "N"
        if isinstance(verdict, str):
            detail = f"{length[sample]} tokens, {num_images[sample]} images"
            key = samples.key[sample].as_py()
            rejects.append((sample, Reject(source, key, f"exceeds_{verdict}", detail)))
        else:
            columns.append(_part_columns(sample, int(length[sample]), verdict))
    joined = np.concatenate(columns, axis=1)
    return Pieces(*joined[:, np.argsort(joined[0], kind="stable")]), rejects


def _part_columns(sample: int, length: int, parts: list[Part]) -> Ints:
    return np.array(
        [
            (sample, number, len(parts), part.start, part.end, length, part.first_image, part.last_image)
            for number, part in enumerate(parts)
        ],
        np.int64,
    ).T


def segments_of(samples: Samples, chosen: Ints) -> list[list[IndexSegment]]:
    """Of the chosen samples, as objects."""
    rows = samples.segments.take(pa.array(chosen)).to_pylist()
    return [[IndexSegment(**segment) for segment in row] for row in rows]


def piece_segments(samples: Samples, pieces: Pieces, ids: TokenIds) -> pa.Array:
    """Segments of every piece: whole samples' as they are, parts' clipped."""
    cut = np.flatnonzero(pieces.parts > 1)
    if not len(cut):
        return samples.segments.take(pa.array(pieces.sample))
    whole = np.flatnonzero(pieces.parts == 1)
    clipped = _clip(samples.segments, pieces.take(cut), ids)
    both = pa.concat_arrays([samples.segments.take(pa.array(pieces.sample[whole])), clipped])
    return both.take(pa.array(np.argsort(np.concatenate([whole, cut]))))


def _clip(segments: pa.ListArray, pieces: Pieces, ids: TokenIds) -> pa.ListArray:
    """The segments of every piece, texts cut to what it needs, in one pass over columns.

    One text token behind the end comes along where there is one: it is the label of the piece's last token. Tokens
    are counted over all samples, without begin and end of text.
    """
    offsets, flat = segment_offsets(segments), segments.flatten()
    kind, offset, tokens = (flat.field(name).to_numpy() for name in ("kind", "offset", "tokens"))
    border = np.concatenate([[0], np.cumsum(tokens, dtype=np.int64)])
    origin = border[offsets[pieces.sample]] - int(ids.bos is not None)
    start, end = origin + pieces.start, origin + pieces.end
    first = np.maximum(offsets[pieces.sample], np.searchsorted(border[1:], start, side="right"))
    last = np.minimum(offsets[pieces.sample + 1], np.searchsorted(border[:-1], end, side="right"))
    count = np.maximum(0, last - first)
    segment, piece = runs(first, count), np.repeat(np.arange(len(pieces)), count)
    begin = np.maximum(start[piece], border[segment])
    # One text token behind the end is the label of the last one.
    is_text = kind[segment] == TEXT
    length = np.minimum(end[piece] + is_text, border[segment + 1]) - begin
    kept = length > 0
    segment, piece, is_text = segment[kept], piece[kept], is_text[kept]
    chosen = flat.take(pa.array(segment))
    columns = {name: chosen.field(name) for name in SEGMENT_TYPE.names}
    columns["tokens"] = pa.array(np.where(is_text, length[kept], tokens[segment]).astype(np.int32))
    skipped = np.where(is_text, begin[kept] - border[segment], 0)
    columns["offset"] = pa.array(offset[segment] + skipped)
    struct = pa.StructArray.from_arrays(list(columns.values()), fields=list(SEGMENT_TYPE))
    ends = np.cumsum(np.bincount(piece, minlength=len(pieces)))
    return pa.ListArray.from_arrays(
        pa.array(np.concatenate([[0], ends]).astype(np.int32)), struct, type=SEGMENTS_TYPE
    )
