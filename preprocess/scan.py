"""Scan: one raw file -> one index. Text is tokenized, of pictures and videos the headers are read.

No pixel is decoded: the exact cost of a picture follows from its size and the resize rule. Samples stream
through in batches, so that memory does not grow with the file.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import numpy as np
import xxhash

from preprocess.config import AnySource, ImageLimits, VideoConfig
from preprocess.faults import NO_ITEM, begin
from preprocess.images import ImageError, read_header
from preprocess.index import IndexWriter, ScannedSample, open_index
from preprocess.inputs import Span, change_time
from preprocess.samples import (
    IMAGE,
    STORE,
    TEXT,
    VIDEO,
    IndexSegment,
    Media,
    Missing,
    Place,
    RawSample,
    Reject,
    Text,
)
from preprocess.sources import open_source
from preprocess.sources.base import SourceContext
from preprocess.sources.tables import max_page_bytes
from preprocess.text import TextError, encode_texts
from preprocess.video import num_temporal_patches, patches_per_frame, read_video_header
from shared.geometry import Geometry, resize_grid, visual_tokens
from shared.tokens import TextTokenizer, TokenNames, Tokens, load_tokenizer

# A batch is tokenized and resized in one call each. Text takes some 120 times its size while it is tokenized
# (measured with a BPE of 8192): 1 MiB keeps a worker small, and one text more is cut into pieces (`text.PIECE`).
# 256 samples are few enough objects for Python's collector: with 1024 it looks at all of the process every 5000.
BATCH_SAMPLES = 256
BATCH_CHARACTERS = 1 << 20
# Reading the next record or picture may mean reading from a distant store: it may take this many times longer than
# the work on one picture.
DRAW_PATIENCE = 20.0


@dataclass(frozen=True, slots=True)
class ScanUnit:
    """Everything one scan task needs: it is pickled to the worker."""

    source: str
    config: AnySource
    unit: str
    output: Path
    tokenizer: Path
    tokens: TokenNames
    geometry: Geometry
    limits: ImageLimits
    video: VideoConfig
    hash_content: bool
    # Set when a worker died of this unit: what to leave out (`preprocess.faults`), by number of `_draw`.
    crashed: dict[int, str] | None = None

    def __str__(self) -> str:
        return self.unit


def scan_unit(task: ScanUnit) -> dict[str, Any]:
    """Write the index of one unit; return its counts (`IndexWriter.counts`).

    Raises:
        UserError: the unit or the tokenizer cannot be read.
    """
    tokenizer = cached_tokenizer(task.tokenizer, task.tokens)
    context = SourceContext(
        task.source,
        task.tokenizer,
        task.tokens,
        task.limits.max_bytes,
        task.video.max_bytes,
        max_page_bytes(task.limits.max_memory),
    )
    source = open_source(task.config, context)
    with open_index(task.output) as index:
        entries = _draw(source.scan(task.unit), task)
        drafts = (_draft(entry, number, task, index) for number, entry in entries)
        for batch in _batches(drafts, task.crashed is not None):
            _tokenize(batch, task, tokenizer)
            _fit_images(batch, task)
            for draft in batch:
                _write(draft, index)
            begin(NO_ITEM)
    return index.counts()


@lru_cache(maxsize=4)
def cached_tokenizer(directory: Path, names: TokenNames) -> TextTokenizer:
    """One tokenizer per process and directory: loading a large one takes a second."""
    return load_tokenizer(directory, names)


Entry = tuple[int, RawSample | Reject]


def _draw(entries: Iterator[RawSample | Reject], task: ScanUnit) -> Iterator[Entry]:
    """The entries of a unit with their numbers n: drawing one is item 2 n of `faults.begin`, working on it 2 n + 1."""
    for number in itertools.count():
        begin(2 * number, DRAW_PATIENCE)
        if detail := (task.crashed or {}).get(2 * number):
            # What lies behind it in the file cannot be reached.
            yield number, Reject(task.source, f"{PurePath(task.unit).name}#rest", "crashed", detail)
            return
        entry = next(entries, None)
        if entry is None:
            return
        yield number, entry


def _batches(drafts: Iterable[_Draft], single: bool) -> Iterator[list[_Draft]]:
    """`single`: one sample at a time, where one of them is to be found: its whole way is then under its number."""
    batch: list[_Draft] = []
    characters = 0
    for draft in drafts:
        batch.append(draft)
        characters += sum(len(text.text) for text in draft.texts)
        if single or len(batch) == BATCH_SAMPLES or characters >= BATCH_CHARACTERS:
            if not single:
                begin(NO_ITEM)
            yield batch
            batch, characters = [], 0
    begin(NO_ITEM)
    if batch:
        yield batch


@dataclass(slots=True)
class _Measured:
    """A picture or a video whose grid is not known yet, and where its bytes lie.

    content: a hash of them, "" where duplicates are not looked for.
    """

    kind: int
    place: Place
    height: int
    width: int
    t: int
    content: str


@dataclass(slots=True)
class _Draft:
    """A sample on its way to the index: `texts` and `tokens` belong to its text segments, in order."""

    key: str
    failed: Reject | None = None
    dropped: list[Reject] = field(default_factory=list[Reject])
    parts: Sequence[Text | _Measured] = ()
    texts: Sequence[Text] = ()
    tokens: Sequence[Tokens] = ()
    segments: Sequence[IndexSegment] = ()
    content_hash: int = 0


# Until its tokens have a place.
_TEXT_SEGMENT = IndexSegment(TEXT, "", 0, 0, 0)


def _draft(entry: RawSample | Reject, number: int, task: ScanUnit, index: IndexWriter) -> _Draft:
    """The pixel sizes of pictures, and the texts; tokens and grids come later, in bulk."""
    item = 2 * number + 1
    begin(item)
    if isinstance(entry, Reject):
        return _Draft(entry.key, failed=entry)
    if detail := (task.crashed or {}).get(item):
        return _Draft(entry.key, failed=Reject(task.source, entry.key, "crashed", detail))
    draft = _Draft(entry.key)
    parts: list[Text | _Measured] = []
    media = 0
    for raw in entry.segments:
        if isinstance(raw, Text):
            parts.append(raw)
            continue
        try:
            parts.append(_measure(raw, item, task, index))
        except ImageError as error:
            reject = Reject(task.source, entry.key, error.reason, str(error))
            if task.config.bad_media == "reject":
                draft.failed = reject
                return draft
            draft.dropped.append(replace(reject, media=media))
        media += 1
    begin(item)
    draft.parts = _joined(parts, entry.separator)
    draft.content_hash = _content_hash(draft.parts) if task.hash_content else 0
    draft.texts = [part for part in draft.parts if isinstance(part, Text)]
    size = sum(len(text.text.encode()) for text in draft.texts)
    if size > (most := task.limits.max_text_bytes):
        detail = f"{size} bytes, limit {most} (limits.max_text_bytes)"
        draft.failed = Reject(task.source, entry.key, "text_too_many_bytes", detail)
    elif not draft.parts:
        reason = "no_usable_image" if draft.dropped else "empty"
        draft.failed = Reject(task.source, entry.key, reason, f"{len(draft.dropped)} images dropped, no text")
    return draft


def _joined(parts: Sequence[Text | _Measured], separator: str) -> list[Text | _Measured]:
    """Plain texts that nothing separates become one; those with spans of their own stay as they are.

    All but the first part are inner ones.
    """
    joined: list[Text | _Measured] = []
    for plain, run in itertools.groupby(parts, _is_plain):
        together = list(run)
        if plain and len(together) > 1:
            together = [Text(separator.join([part.text for part in together if isinstance(part, Text)]))]
        for part in together:
            if joined and isinstance(part, Text):
                part = Text(part.text, part.learned, part.special, inner=True)
            joined.append(part)
    return joined


def _is_plain(part: Text | _Measured) -> bool:
    return isinstance(part, Text) and part.learned is None and not part.special


def _content_hash(parts: Iterable[Text | _Measured]) -> int:
    """What tells samples apart that train something else: every part with its kind, and whose words are learned."""
    digest = xxhash.xxh3_64()
    for part in parts:
        if isinstance(part, Text):
            said = (
                TEXT,
                xxhash.xxh3_128_hexdigest(part.text.encode()),
                part.learned,
                part.special,
                part.inner,
            )
        else:
            said = (part.kind, part.content)
        digest.update(repr(said).encode())
    return digest.intdigest()


def _measure(raw: Media | Missing, item: int, task: ScanUnit, index: IndexWriter) -> _Measured:
    """The size of a picture or a video, t, and where its bytes lie; and the hash of those.

    Raises:
        ImageError: it is not there, or not usable.
    """
    if isinstance(raw, Missing):
        raise ImageError(raw.reason, raw.detail)
    begin(item, DRAW_PATIENCE)  # its bytes may come from a distant store
    file, data = raw.file, None
    size = file.seek(0, io.SEEK_END) if raw.place is None else raw.place.size
    most = task.video.max_bytes if raw.kind == VIDEO else task.limits.max_bytes
    if (task.hash_content or raw.place is None) and size <= most:
        file.seek(0)
        data = file.whole() if isinstance(file, Span) else file.read(size)  # once, for header, hash and store
        file = io.BytesIO(data)
        begin(item)
    content = xxhash.xxh3_128_hexdigest(data) if task.hash_content and data is not None else ""
    height, width, t = _displayed(file, raw.kind, task)
    if raw.place is None:
        assert data is not None, "a picture of too many bytes was rejected by its header"
        place = Place(STORE, index.store(data), size)
    else:
        place = raw.place
    return _Measured(raw.kind, place, height, width, t, content)


def _displayed(file: BinaryIO, kind: int, task: ScanUnit) -> tuple[int, int, int]:
    """Height, width and t of a picture or a video.

    Raises:
        ImageError: it is not usable.
    """
    if kind == IMAGE:
        picture = read_header(file, limits=task.limits)
        return picture.height, picture.width, 1
    video = read_video_header(file, limits=task.limits, config=task.video)
    return video.height, video.width, num_temporal_patches(video, task.video, task.geometry)


def _tokenize(drafts: Sequence[_Draft], task: ScanUnit, tokenizer: TextTokenizer) -> None:
    """Tokens of all texts of a batch, in one call."""
    alive = [draft for draft in drafts if draft.failed is None]
    encoded = iter(encode_texts([text for draft in alive for text in draft.texts], tokenizer))
    for draft in alive:
        found = [next(encoded) for _ in draft.texts]
        errors = [tokens for tokens in found if isinstance(tokens, TextError)]
        draft.tokens = [tokens for tokens in found if not isinstance(tokens, TextError)]
        if errors:
            draft.failed = Reject(task.source, draft.key, errors[0].reason, str(errors[0]))
        elif any(not len(tokens) for tokens in draft.tokens):
            text = next(t.text for t, ids in zip(draft.texts, draft.tokens, strict=True) if not len(ids))
            detail = f"the tokenizer makes nothing of {text[:60]!r}"
            draft.failed = Reject(task.source, draft.key, "text_without_tokens", detail)


def _fit_images(drafts: Sequence[_Draft], task: ScanUnit) -> None:
    """Segments of a batch; grids of all its pictures and videos in one computation."""
    alive = [draft for draft in drafts if draft.failed is None]
    found = [part for draft in alive for part in draft.parts if isinstance(part, _Measured)]
    geometry = task.geometry
    caps = [
        patches_per_frame(m.t, task.video, geometry) if m.kind == VIDEO else geometry.max_patches_per_image
        for m in found
    ]
    sizes = np.array([(m.height, m.width) for m in found], np.int64).reshape(-1, 2)
    grids = iter(resize_grid(sizes[:, 0], sizes[:, 1], geometry, np.array(caps, np.int64)).tolist())

    def segment(part: Text | _Measured) -> IndexSegment:
        if isinstance(part, Text):
            return _TEXT_SEGMENT
        place, t, (h, w) = part.place, part.t, next(grids)
        tokens = visual_tokens(t, h, w, geometry.merge) + 2
        state = 0 if place.file in (STORE, task.unit) else change_time(place.file)
        return IndexSegment(
            part.kind, place.file, place.offset, place.size, tokens, part.height, part.width, t, h, w, state
        )

    for draft in alive:
        draft.segments = [segment(part) for part in draft.parts]


def _write(draft: _Draft, index: IndexWriter) -> None:
    if draft.failed is not None:
        index.reject(draft.failed)
        return
    index.append(ScannedSample(draft.key, draft.content_hash, draft.segments, draft.tokens))
    for reject in draft.dropped:
        index.reject(reject)
