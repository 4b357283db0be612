"""Scan: one raw file -> one index file, a row per sample. Text is tokenized, pictures' headers are read.

No pixel is decoded: the exact cost of an image follows from its size and the resize rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
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

    def __str__(self) -> str:
        return self.unit


def scan_unit(task: ScanUnit) -> int:
    """Write the index file of one unit; return the number of samples read.

    Raises:
        UserError: the unit or the tokenizer cannot be read.
    """
    tokenizer = cached_tokenizer(task.tokenizer, task.tokens)
    # One sample's bytes in memory at a time: what is kept of each is its text and its sizes.
    samples = [
        _measure(entry, task.limits) for entry in open_source(task.source, task.config).scan(task.unit)
    ]
    outcomes = _fit_images(_count_tokens(samples, tokenizer), task.geometry)
    _write_index(task.output, [sample.key for sample in samples], outcomes)
    return len(samples)


@lru_cache(maxsize=4)
def cached_tokenizer(directory: Path, names: TokenNames) -> TextTokenizer:
    """One tokenizer per process and directory: loading a large one takes a second."""
    return load_tokenizer(directory, names)


Outcome = list[IndexSegment] | Reject


@dataclass(frozen=True, slots=True)
class _Measured:
    """One sample on its way: `texts` are what is still to be tokenized."""

    key: str
    outcome: Outcome
    texts: list[str]


def _measure(entry: RawSample | Reject, limits: ImageLimits) -> _Measured:
    """Segments with the pixel sizes of their images, and the texts; tokens and grids come later, in bulk."""
    if isinstance(entry, Reject):
        return _Measured(entry.key, entry, [])
    segments: list[IndexSegment] = []
    texts: list[str] = []
    for raw in entry.segments:
        if isinstance(raw.content, str):
            segments.append(IndexSegment(TEXT, raw.offset, raw.size, tokens=0))
            texts.append(raw.content)
            continue
        try:
            header = read_header(raw.content, max_pixels=limits.max_pixels, max_bytes=limits.max_bytes)
        except ImageError as error:
            return _Measured(entry.key, Reject("", entry.key, error.reason, str(error)), [])
        segments.append(IndexSegment(IMAGE, raw.offset, raw.size, 0, header.height, header.width))
    return _Measured(entry.key, segments, texts)


def _count_tokens(samples: Sequence[_Measured], tokenizer: TextTokenizer) -> list[Outcome]:
    """Fill in the tokens of text segments: one tokenizer call for the whole unit."""
    encoded = iter(tokenizer.encode([text for sample in samples for text in sample.texts]))

    def fill(sample: _Measured) -> Outcome:
        outcome = sample.outcome
        tokens = [next(encoded) for _ in sample.texts]
        if isinstance(outcome, Reject):
            return outcome
        for text, ids in zip(sample.texts, tokens, strict=True):
            if len(ids) == 0:
                return Reject("", "", "text_without_tokens", f"the tokenizer makes nothing of {text[:60]!r}")
            if tokenizer.holds_special(ids):
                return Reject("", "", "special_token_in_text", f"text {text[:60]!r}")
        lengths = iter([len(ids) for ids in tokens])
        return [replace(s, tokens=next(lengths)) if s.kind == TEXT else s for s in outcome]

    return [fill(sample) for sample in samples]


def _fit_images(outcomes: Sequence[Outcome], geometry: Geometry) -> list[Outcome]:
    """Fill in the grids of images: one resize computation for the whole unit."""
    samples = [outcome for outcome in outcomes if not isinstance(outcome, Reject)]
    images = [segment for segments in samples for segment in segments if segment.kind == IMAGE]
    sizes = np.array([(image.height, image.width) for image in images], np.int64).reshape(-1, 2)
    grids = iter(resize_grid(sizes[:, 0], sizes[:, 1], geometry).tolist())

    def fill(segment: IndexSegment) -> IndexSegment:
        if segment.kind == TEXT:
            return segment
        h, w = next(grids)
        return replace(segment, tokens=visual_tokens(1, h, w, geometry.merge) + 2, t=1, h=h, w=w)

    return [o if isinstance(o, Reject) else [fill(segment) for segment in o] for o in outcomes]


def segments_column(samples: Sequence[Sequence[IndexSegment]]) -> pa.ListArray:
    """Segments of many samples as one Arrow column of type SEGMENTS_TYPE."""
    flat = [astuple(segment) for segments in samples for segment in segments]
    columns = list(zip(*flat, strict=True)) if flat else [() for _ in SEGMENT_TYPE]
    children = [pa.array(column, field.type) for column, field in zip(columns, SEGMENT_TYPE, strict=True)]
    struct = pa.StructArray.from_arrays(children, fields=list(SEGMENT_TYPE))
    offsets = np.cumsum([0, *(len(segments) for segments in samples)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), struct, type=SEGMENTS_TYPE)


def _write_index(path: Path, keys: Sequence[str], outcomes: Sequence[Outcome]) -> None:
    rejects = [outcome if isinstance(outcome, Reject) else None for outcome in outcomes]
    columns = [
        pa.array(keys, pa.string()),
        pa.array([reject.reason if reject else "" for reject in rejects], pa.string()),
        pa.array([reject.detail if reject else "" for reject in rejects], pa.string()),
        segments_column([[] if isinstance(outcome, Reject) else outcome for outcome in outcomes]),
    ]
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_arrays(columns, schema=INDEX_SCHEMA), temporary, compression="zstd")
