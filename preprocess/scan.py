"""Scan: one raw file -> one index file, a row per sample. Text is tokenized, pictures' headers are read.

No pixel is decoded: the exact cost of an image follows from its size and the resize rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from preprocess.config import ImageLimits, SourceConfig
from preprocess.images import ImageError, read_header
from preprocess.samples import (
    IMAGE,
    INDEX_SCHEMA,
    SEGMENT_TYPE,
    SEGMENTS_TYPE,
    TEXT,
    IndexSegment,
    RawSample,
    Reject,
)
from preprocess.sources import open_source
from shared.files import atomic_path
from shared.geometry import Geometry, resize_grid, visual_tokens
from shared.tokens import TextTokenizer, TokenNames, load_tokenizer


@dataclass(frozen=True, slots=True)
class ScanUnit:
    """Everything one scan task needs: it is pickled to the worker."""

    source: str
    config: SourceConfig
    unit: str
    output: Path
    tokenizer: Path
    tokens: TokenNames
    geometry: Geometry
    limits: ImageLimits


def scan_unit(task: ScanUnit) -> int:
    """Write the index file of one unit; return the number of samples read.

    Raises:
        UserError: the unit or the tokenizer cannot be read.
    """
    tokenizer = cached_tokenizer(task.tokenizer, task.tokens)
    source = open_source(task.source, task.config)
    keys: list[str] = []
    reasons: list[tuple[str, str]] = []
    drafts: list[list[IndexSegment]] = []
    texts: list[str] = []
    for entry in source.scan(task.unit):
        outcome = _measure(entry, task.limits)
        keys.append(entry.key)
        if isinstance(outcome, Reject):
            reasons.append((outcome.reason, outcome.detail))
            drafts.append([])
            continue
        reasons.append(("", ""))
        drafts.append(outcome)
        assert isinstance(entry, RawSample)
        texts += [segment.content for segment in entry.segments if isinstance(segment.content, str)]
    samples = _with_costs(drafts, texts, tokenizer, task.geometry)
    _write_index(task.output, keys, reasons, samples)
    return len(keys)


@lru_cache(maxsize=4)
def cached_tokenizer(directory: Path, names: TokenNames) -> TextTokenizer:
    """One tokenizer per process and directory: loading a large one takes a second."""
    return load_tokenizer(directory, names)


def read_index(path: Path) -> pa.Table:
    return pq.read_table(path, schema=INDEX_SCHEMA)


def _measure(entry: RawSample | Reject, limits: ImageLimits) -> list[IndexSegment] | Reject:
    """Segments with the pixel sizes of their images; tokens and grids come later, for all samples at once."""
    if isinstance(entry, Reject):
        return entry
    segments: list[IndexSegment] = []
    for raw in entry.segments:
        if isinstance(raw.content, str):
            segments.append(IndexSegment(TEXT, raw.offset, raw.size, tokens=0))
            continue
        try:
            header = read_header(raw.content, max_pixels=limits.max_pixels, max_bytes=limits.max_bytes)
        except ImageError as error:
            return Reject("", entry.key, error.reason, str(error))
        segments.append(IndexSegment(IMAGE, raw.offset, raw.size, 0, header.height, header.width))
    return segments


def _with_costs(
    drafts: Sequence[Sequence[IndexSegment]], texts: Sequence[str], tokenizer: TextTokenizer, geometry: Geometry
) -> list[list[IndexSegment]]:
    """Fill in tokens and grids: one tokenizer call and one resize computation for the whole unit."""
    text_tokens = iter([len(ids) for ids in tokenizer.encode(texts)])
    images = [segment for segments in drafts for segment in segments if segment.kind == IMAGE]
    sizes = np.array([(image.height, image.width) for image in images], np.int64).reshape(-1, 2)
    grids = iter(resize_grid(sizes[:, 0], sizes[:, 1], geometry).tolist())

    def fill(draft: IndexSegment) -> IndexSegment:
        if draft.kind == TEXT:
            return IndexSegment(TEXT, draft.offset, draft.size, next(text_tokens))
        h, w = next(grids)
        tokens = visual_tokens(1, h, w, geometry.merge) + 2
        return IndexSegment(
            IMAGE, draft.offset, draft.size, tokens, draft.height, draft.width, t=1, h=h, w=w
        )

    return [[fill(draft) for draft in segments] for segments in drafts]


def segments_column(samples: Sequence[Sequence[IndexSegment]]) -> pa.ListArray:
    """Segments of many samples as one Arrow column of type SEGMENTS_TYPE."""
    flat = [astuple(segment) for segments in samples for segment in segments]
    columns = list(zip(*flat, strict=True)) if flat else [() for _ in SEGMENT_TYPE]
    children = [pa.array(column, field.type) for column, field in zip(columns, SEGMENT_TYPE, strict=True)]
    struct = pa.StructArray.from_arrays(children, fields=list(SEGMENT_TYPE))
    offsets = np.cumsum([0, *(len(segments) for segments in samples)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), struct, type=SEGMENTS_TYPE)


def _write_index(
    path: Path,
    keys: Sequence[str],
    reasons: Sequence[tuple[str, str]],
    samples: Sequence[Sequence[IndexSegment]],
) -> None:
    columns = [
        pa.array(keys, pa.string()),
        pa.array([reason for reason, _ in reasons], pa.string()),
        pa.array([detail for _, detail in reasons], pa.string()),
        segments_column(samples),
    ]
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_arrays(columns, schema=INDEX_SCHEMA), temporary, compression="zstd")
