"""One chunk of interleaved documents -> one Parquet file of the same schema, bytes in place of URLs.

    images          list<binary>   the bytes; null where there was no image, or where it could not be fetched
    image_urls      list<string>   what stood in `images`
    image_failures  list<string>   the reason where an image is missing, null elsewhere
    texts, others                  as they were (of JSON lines: text, what is no text as JSON)

The three lists of a document are as long as its `images` were. Bodies go to one unnamed file on disk as they come
in; the documents are then written in their order, a row group at a time.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from preprocess.fetch.account import Result
from preprocess.fetch.client import Client, Failure
from preprocess.fetch.config import DocumentsInput
from preprocess.fetch.responses import redacted
from preprocess.fetch.spool import Place, Spool, fetched
from preprocess.fetch.tables import Chunk, Record, RowError, key_of
from shared.errors import UserError

URLS, FAILURES = "image_urls", "image_failures"
# Images of one row group; a group is in memory some times over while it is written.
GROUP_BYTES = 16 << 20
# A list of Parquet holds 2 GiB.
MAX_DOCUMENT_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class _Document:
    key: str
    row: int
    record: Record
    urls: list[str | None]


async def fetch_documents(chunk: Chunk, config: DocumentsInput, client: Client, path: Path) -> Result:
    """Write the Parquet file at `path`; the result counts documents as rows, and their images."""
    result = Result()
    documents = list(_documents(chunk, config, result))
    urls = (url for document in documents for url in document.urls if url is not None)
    async with fetched(client, urls, path.parent) as spool:
        schema = _schema(chunk, config, documents)
        await asyncio.to_thread(_write, path, schema, _filled(documents, config, spool, result))
    return result


def _documents(chunk: Chunk, config: DocumentsInput, result: Result) -> Iterator[_Document]:
    """The rows that are documents; the others are failures in `result`."""
    for number, row in enumerate(chunk.rows, chunk.first_row):
        result.rows.read += 1
        key = f"{number:010d}"
        try:
            record = row()
            key = key_of(record, config.key, number)
            urls = _texts(record, config.images)
            _texts(record, config.texts)
        except RowError as error:
            result.fail_row(key, number, "", error.reason, error.detail)
            continue
        yield _Document(key, number, record, urls)


def _texts(record: Record, column: str) -> list[str | None]:
    values = record.get(column)
    values = [] if values is None else values
    if not isinstance(values, list) or not all(value is None or isinstance(value, str) for value in values):
        raise RowError("row_malformed", f"{column!r} is no list of texts and nulls")
    return values


def _filled(
    documents: Iterable[_Document], config: DocumentsInput, spool: Spool, result: Result
) -> Iterator[tuple[Record, int]]:
    """Each document with its bytes, and how many they are; counts its images."""
    for document in documents:
        images: list[bytes | None] = []
        failures: list[str | None] = []
        size = 0
        for position, url in enumerate(document.urls):
            image = None if url is None else _image(spool.outcomes[url], spool, MAX_DOCUMENT_BYTES - size)
            result.images.read += url is not None
            if isinstance(image, Failure):
                reason, detail = image.reason, image.detail
                result.fail_image(document.key, document.row, position, str(url), reason, detail)
            elif image is not None:
                result.images.fetched += 1
                size += len(image)
            images.append(image if isinstance(image, bytes) else None)
            failures.append(image.reason if isinstance(image, Failure) else None)
        result.rows.fetched += 1
        result.image_bytes += size
        urls = [url if url is None else redacted(url) for url in document.urls]
        lists = {config.images: images, URLS: urls, FAILURES: failures}
        if document.record.get(config.images) is None:  # no list is not an empty one
            lists = dict.fromkeys(lists)
        yield {**document.record, **lists}, size


def _image(outcome: Place | Failure, spool: Spool, room: int) -> bytes | Failure:
    if isinstance(outcome, Failure):
        return outcome
    if outcome.size > room:
        return Failure("document_too_large", f"its images are more than {MAX_DOCUMENT_BYTES} bytes")
    return spool.read(outcome)


def _schema(chunk: Chunk, config: DocumentsInput, documents: Sequence[_Document]) -> pa.Schema:
    """The columns of the input with binary images, then ours."""
    if chunk.schema is not None:
        fields = list(chunk.schema)
    else:
        names = dict.fromkeys(name for document in documents for name in document.record)
        names = dict.fromkeys((config.images, config.texts, *names))
        fields = [pa.field(n, pa.list_(pa.string()) if n == config.texts else pa.string()) for n in names]
    images = pa.field(config.images, pa.list_(pa.binary()))
    ours = [pa.field(name, pa.list_(pa.string())) for name in (URLS, FAILURES)]
    if taken := {field.name for field in fields} & {URLS, FAILURES}:
        raise UserError(
            f"input: the documents have a column {min(taken)!r} already; rename it, it is written here"
        )
    return pa.schema([*(images if field.name == config.images else field for field in fields), *ours])


def _write(path: Path, schema: pa.Schema, documents: Iterator[tuple[Record, int]]) -> None:
    # Pictures do not shrink, and no two are worth a dictionary.
    options: dict[str, Any] = {"compression": "zstd", "use_dictionary": False, "write_page_checksum": True}
    with pq.ParquetWriter(path, schema, **options) as writer:
        group: list[Record] = []
        size = 0
        for record, image_bytes in documents:
            if group and size + image_bytes > GROUP_BYTES:
                writer.write_table(_table(group, schema), row_group_size=len(group))
                group, size = [], 0
            group.append(record)
            size += image_bytes
        if group:
            writer.write_table(_table(group, schema), row_group_size=len(group))


def _table(records: Sequence[Record], schema: pa.Schema) -> pa.Table:
    strings = [field.name for field in schema if pa.types.is_string(field.type)]
    rows = [{**record, **{name: _as_text(record.get(name)) for name in strings}} for record in records]
    return pa.Table.from_pylist(rows, schema=schema)


def _as_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
