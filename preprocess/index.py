"""The index: what the scan of one raw file leaves behind, and all that plan and pack know of it.

    index/SOURCE/000000.parquet          one row per usable sample (INDEX_SCHEMA), and counts in the footer
    index/SOURCE/000000.tokens           the texts as tokens, int32; ~token where it is not learned
    index/SOURCE/000000.media            encoded pictures that have no place of their own in a file; only if any
    index/SOURCE/000000.rejects.parquet  what is not trained on (REJECT_SCHEMA); only if any

The first is written last: where it exists, the others are whole, and it knows their sizes. The tokens have a checksum
besides, as a flipped bit in them is another text; a picture's own format has to notice.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from preprocess.samples import (
    INDEX_SCHEMA,
    REJECT_SCHEMA,
    TEXT,
    IndexSegment,
    Reject,
    fields_column,
    reject_table,
    segment_fields,
)
from shared.errors import UserError
from shared.files import atomic_path, file_checksum, file_size, remove
from shared.remote import shown
from shared.tables import open_table
from shared.tokens import Tokens

# Samples per row group: neighbours that the plan keeps in one window.
ROWS_PER_BLOCK = 1024
# Tokens that wait to be written in one go, of 4 bytes.
WAITING_TOKENS = 1 << 20
# How it is written. Nobody searches it by value, and without statistics a block is found in half the time; of the
# columns only `file` repeats itself, and without dictionaries for the others a file is a quarter smaller.
INDEX_OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    "use_dictionary": ["segments.list.element.file"],
    "write_statistics": False,
    "write_page_checksum": True,
}
COUNTS = b"parquetry.counts"
# Rejects that stand for all of a raw file, or for all behind some place in it: how their keys end, or their reason.
LOST = ("#file", "#rest")
LOST_REASONS = ("rest_unreadable", "batch_unreadable")
MEND = "delete it and run again, it will be scanned again"


@dataclass(frozen=True, slots=True)
class IndexedUnit:
    """One raw file; `path` is its index file."""

    source: str
    unit: str
    path: Path

    @property
    def rejects(self) -> Path:
        return reject_file(self.path)


def reject_file(index: Path) -> Path:
    return index.with_suffix(".rejects.parquet")


def token_file(index: Path) -> Path:
    return index.with_suffix(".tokens")


def media_file(index: Path) -> Path:
    return index.with_suffix(".media")


def read_blocks(
    path: Path, columns: Sequence[str], groups: Sequence[int] | None = None
) -> Iterator[pa.Table]:
    """Some columns of the blocks of an index file, one block at a time; `groups` numbers those wanted, else all.

    Raises:
        UserError: it is missing or damaged.
    """
    with open_table(path, MEND) as file:
        for group in range(file.num_row_groups) if groups is None else groups:
            yield file.read_row_group(group, columns=list(columns), use_threads=False)


def read_counts(path: Path) -> dict[str, Any]:
    """What the scan counted, from the footer: `IndexWriter.counts`.

    Raises:
        UserError: the file is missing or damaged.
    """
    with open_table(path, MEND) as file:
        metadata = file.metadata.metadata or {}
    try:
        return json.loads(metadata[COUNTS])
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error!r}); {MEND}") from None


def mend_beside(index: Path) -> str:
    """What to do about a file that stands beside an index and is gone or damaged."""
    return f"delete {index.name} beside it and run again, it will be scanned again"


def check_stores(indexes: Sequence[Path]) -> None:
    """Whether tokens and pictures beside each index are what the scan wrote.

    Raises:
        UserError: a file is gone or has another size, or its tokens another checksum.
    """
    for index in indexes:
        counts, tokens, media = read_counts(index), token_file(index), media_file(index)
        wanted = [(tokens, 4 * counts["text_tokens"])]
        if counts["media_bytes"]:
            wanted.append((media, counts["media_bytes"]))
        for path, size in wanted:
            if (found := file_size(path)) != size:
                state = "is gone" if found is None else f"has {found} bytes, not {size}"
                raise UserError(f"{shown(path)}: {state}; {mend_beside(index)}")
        if file_checksum(tokens) != counts["token_checksum"]:
            raise UserError(f"{shown(tokens)}: damaged (another checksum); {mend_beside(index)}")


@dataclass(frozen=True, slots=True)
class ScannedSample:
    """A usable sample; `texts` are the tokens of its text segments, ~token where not learned."""

    key: str
    content_hash: int
    segments: Sequence[IndexSegment]
    texts: Sequence[Tokens]


class IndexWriter:
    """Writes the files of one unit as samples come; no more than a block of them is kept in memory."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._path, self._stack = path, stack
        self._parquet = pq.ParquetWriter(
            stack.enter_context(atomic_path(path)), INDEX_SCHEMA, **INDEX_OPTIONS
        )
        self._tokens: IO[bytes] = open(stack.enter_context(atomic_path(token_file(path))), "wb")
        self._media: IO[bytes] | None = None
        self._num_tokens = self._num_unlearned = self._media_bytes = 0
        # The block that is being filled: columns, segments as their fields.
        self._keys: list[str] = []
        self._content_hashes: list[int] = []
        self._segments: list[tuple[int | str, ...]] = []
        self._lengths: list[int] = []
        self._texts: list[Tokens] = []
        self._written_tokens = 0
        self._rejects: list[Reject] = []
        self._reject_file: pq.ParquetWriter | None = None
        self._reasons, self._media_reasons = Counter[str](), Counter[str]()
        self._lost = ""
        self._token_digest = xxhash.xxh3_64()
        self.read = self.samples = self.media = 0

    def append(self, sample: ScannedSample) -> None:
        """Take a sample whose text segments have no place yet: it is given here."""
        texts = iter(sample.texts)
        for segment in sample.segments:
            if segment.kind == TEXT:
                tokens = next(texts)
                self._texts.append(tokens)
                segment = IndexSegment(TEXT, "", self._num_tokens, 0, len(tokens))
                self._num_tokens += len(tokens)
            else:
                self.media += 1
            self._segments.append(segment_fields(segment))
        self._keys.append(sample.key)
        self._content_hashes.append(sample.content_hash)
        self._lengths.append(len(sample.segments))
        self.samples += 1
        self.read += 1
        if self._num_tokens - self._written_tokens >= WAITING_TOKENS:
            self._flush_tokens()
        if len(self._keys) == ROWS_PER_BLOCK:
            self._flush()

    def reject(self, reject: Reject) -> None:
        self.read += reject.media < 0
        (self._reasons if reject.media < 0 else self._media_reasons)[reject.reason] += 1
        self._rejects.append(reject)
        if len(self._rejects) == ROWS_PER_BLOCK:
            self._flush_rejects()
        if reject.key.endswith(LOST) or reject.reason in LOST_REASONS:
            self._lost = self._lost or f"{reject.key}: {reject.detail}"

    def store(self, data: bytes) -> int:
        """Keep an encoded picture; returns its offset in the unit's media file."""
        if self._media is None:
            self._media = open(self._stack.enter_context(atomic_path(media_file(self._path))), "wb")
        offset = self._media_bytes
        self._media.write(data)
        self._media_bytes += len(data)
        return offset

    def counts(self) -> dict[str, Any]:
        """Samples read and usable; tokens of text, all and unlearned; pictures and videos kept; rejects by reason.

        `lost`: what says that samples of the raw file were never seen, "" where all were.
        """
        return {
            "read": self.read,
            "samples": self.samples,
            "text_tokens": self._num_tokens,
            "unlearned_tokens": self._num_unlearned,
            "media": self.media,
            "rejected": dict(sorted(self._reasons.items())),
            "media_dropped": dict(sorted(self._media_reasons.items())),
            "lost": self._lost,
            "token_checksum": self._token_digest.hexdigest(),
            "media_bytes": self._media_bytes,
        }

    def close(self) -> None:
        self._flush()
        self._flush_rejects()
        if self._reject_file is not None:
            self._reject_file.close()
        self._tokens.close()
        if self._media is not None:
            self._media.close()
        self._parquet.add_key_value_metadata({COUNTS.decode(): json.dumps(self.counts())})
        self._parquet.close()

    def abandon(self) -> None:
        """Let the files go, unfinished."""
        for file in (self._tokens, self._media, self._reject_file, self._parquet):
            if file is not None:
                file.close()

    def _flush_rejects(self) -> None:
        if not self._rejects:
            return
        if self._reject_file is None:
            path = self._stack.enter_context(atomic_path(reject_file(self._path)))
            self._reject_file = pq.ParquetWriter(path, REJECT_SCHEMA)
        self._reject_file.write_table(reject_table(self._rejects))
        self._rejects = []

    def _flush_tokens(self) -> None:
        if not self._texts:
            return
        tokens = np.concatenate(self._texts)
        data = tokens.astype("<i4", copy=False).data
        self._tokens.write(data)
        self._token_digest.update(data)
        self._num_unlearned += int((tokens < 0).sum())
        self._texts, self._written_tokens = [], self._num_tokens

    def _flush(self) -> None:
        self._flush_tokens()
        if not self._keys:
            return
        hashes = [xxhash.xxh3_64_intdigest(key.encode()) for key in self._keys]
        columns = [
            pa.array(self._keys, pa.string()),
            pa.array(np.array(hashes, np.uint64)),
            pa.array(np.array(self._content_hashes, np.uint64)),
            fields_column(self._segments, self._lengths),
        ]
        self._parquet.write_table(pa.Table.from_arrays(columns, schema=INDEX_SCHEMA))
        self._keys, self._content_hashes, self._segments, self._lengths = [], [], [], []


@contextmanager
def open_index(path: Path) -> Generator[IndexWriter, None, None]:
    """The writer of one unit's files, which appear when all is written, the index itself last.

    What an earlier scan left there goes first: this one may have no rejects, or no pictures to keep.
    """
    for old in (path, token_file(path), media_file(path), reject_file(path)):
        remove(old)
    with ExitStack() as stack:
        writer = IndexWriter(path, stack)
        try:
            yield writer
            writer.close()
        except BaseException:
            writer.abandon()
            raise
