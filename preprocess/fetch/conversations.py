"""One chunk of chat records -> one file of JSON lines, packed with Zstandard: pictures in the place of their URLs.

    {"messages": [{.., "content": [{"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,.."}}, ..]}, ..],
     "image_urls": ["https://.."], "image_failures": [null], ..}

    image_urls      what stood in the record, of every picture that was named by its URL, in their order
    image_failures  the reason where such a picture is missing, null elsewhere

All else of a record is as it was, pictures by path and data: URLs too; of tables, as JSON has it, bytes of pictures as
data: URLs. Where a picture could not be fetched stands "", which the chat source takes for a missing picture. What
base 64 adds to the bytes, Zstandard takes off again: 1.004 bytes per byte of noise (benchmarks/fetch.py).
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from preprocess.fetch.account import Result
from preprocess.fetch.client import Client, Failure
from preprocess.fetch.config import ChatInput
from preprocess.fetch.responses import SNIFF_BYTES, redacted, sniff
from preprocess.fetch.spool import Spool, fetched
from preprocess.fetch.tables import Chunk, Record, RowError, key_of, plain
from preprocess.sources.chat_turns import picture_places
from preprocess.sources.pictures import NAMED_BY, is_address
from preprocess.sources.record import MAX_RECORD_BYTES
from shared.errors import UserError

URLS, FAILURES = "image_urls", "image_failures"
# Of a line, for each picture: what stands around its bytes, and the name of a reason.
AROUND_BYTES = 128
_TYPES = {"jpg": "jpeg", "tif": "tiff"}


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where a record holds the URL of a picture."""

    holder: Any
    name: Any
    url: str


@dataclass(frozen=True, slots=True)
class _Conversation:
    key: str
    row: int
    record: Record
    slots: list[_Slot]


async def fetch_conversations(chunk: Chunk, config: ChatInput, client: Client, path: Path) -> Result:
    """Write the lines at `path`; the result counts records as rows, and the pictures that they name by URL."""
    result = Result()
    conversations = deque(_conversations(chunk, config, result))
    urls = (slot.url for conversation in conversations for slot in conversation.slots)
    async with fetched(client, urls, path.parent) as spool:
        await asyncio.to_thread(_write, path, conversations, spool, result)
    return result


def _conversations(chunk: Chunk, config: ChatInput, result: Result) -> Iterator[_Conversation]:
    """The rows that are records; the others are failures in `result`."""
    for number, row in enumerate(chunk.rows, chunk.first_row):
        result.rows.read += 1
        key = f"{number:010d}"
        try:
            record = row()
            key = key_of(record, config.key, number)
            for holder, name in _pictures(record):
                if isinstance(holder[name], bytes):
                    holder[name] = _data_url(holder[name])
            record = cast(Record, plain(record))
        except RowError as error:
            result.fail_row(key, number, "", error.reason, error.detail)
            continue
        if taken := record.keys() & {URLS, FAILURES}:
            raise UserError(
                f"input: record {key} has a field {min(taken)!r} already; rename it, it is written here"
            )
        places = [(holder, name, holder[name]) for holder, name in _pictures(record)]
        slots = [_Slot(*place) for place in places if isinstance(place[2], str) and is_address(place[2])]
        yield _Conversation(key, number, record, slots)


def _pictures(record: Record) -> Iterator[tuple[Any, Any]]:
    """Where the values lie that say which pictures a record has: `picture_places`, and inside of objects there."""
    for holder, name in picture_places(record):
        value = holder[name]
        if isinstance(value, dict):
            inner = next((key for key in NAMED_BY if cast(Record, value).get(key) is not None), None)
            if inner is not None:
                yield value, inner
        else:
            yield holder, name


def _data_url(data: bytes) -> str:
    kind = sniff(data[:SNIFF_BYTES])
    media_type = f"image/{_TYPES.get(kind, kind)}" if kind else "application/octet-stream"
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def _write(path: Path, conversations: deque[_Conversation], spool: Spool, result: Result) -> None:
    with pa.output_stream(str(path), compression="zstd") as file:
        while conversations:  # taken out one at a time: with its pictures a record is large
            line = _line(conversations.popleft(), spool, result)
            if line is not None:
                file.write(line)


def _line(conversation: _Conversation, spool: Spool, result: Result) -> bytes | None:
    """The record with its pictures; counts them. None where it is too large without them."""
    record, slots = conversation.record, conversation.slots
    if slots:
        record |= {URLS: [redacted(slot.url) for slot in slots], FAILURES: [None] * len(slots)}
    for slot in slots:
        slot.holder[slot.name] = ""
    room = MAX_RECORD_BYTES - len(_encoded(record)) - AROUND_BYTES * len(slots)
    if room < 0:
        detail = f"more than {MAX_RECORD_BYTES} bytes without its pictures"
        result.fail_row(conversation.key, conversation.row, "", "row_too_many_bytes", detail)
        return None
    for position, slot in enumerate(slots):
        outcome = spool.outcomes[slot.url]
        size = 0 if isinstance(outcome, Failure) else -(-outcome.size // 3) * 4
        if size > room:
            outcome = Failure("document_too_large", f"its pictures are more than {MAX_RECORD_BYTES} bytes")
        result.images.read += 1
        if isinstance(outcome, Failure):
            record[FAILURES][position] = outcome.reason
            place = (conversation.key, conversation.row, position, slot.url)
            result.fail_image(*place, outcome.reason, outcome.detail)
            continue
        slot.holder[slot.name] = _data_url(spool.read(outcome))
        room -= size
        result.images.fetched += 1
        result.image_bytes += outcome.size
    result.rows.fetched += 1
    return _encoded(record)


def _encoded(record: Record) -> bytes:
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
