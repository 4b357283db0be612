"""One chunk of URL + caption rows -> one webdataset tar, written as the pictures come in.

    0000000042.jpg    the bytes as the server sent them
    0000000042.txt    the caption
    0000000042.json   {"key", "url", "sha256", "row": the whole row}

Samples lie in the order of their arrival. A picture that several rows name is asked for once and stored for each.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import quote

from preprocess.fetch.account import Result
from preprocess.fetch.client import Body, Client, Failure
from preprocess.fetch.config import CaptionsInput
from preprocess.fetch.tables import Chunk, Record, RowError, key_of, plain

MAX_KEY_CHARACTERS = 200  # of a file name, which holds 255 bytes


@dataclass(frozen=True, slots=True)
class _Sample:
    key: str
    row: int
    url: str
    caption: str
    record: Record


async def fetch_captions(chunk: Chunk, config: CaptionsInput, client: Client, path: Path) -> Result:
    """Fill the tar at `path`; the result counts rows."""
    result = Result()
    wanted: defaultdict[str, list[_Sample]] = defaultdict(list)
    for sample in _samples(chunk, config, result):
        wanted[sample.url].append(sample)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:

        def store(url: str, outcome: Body | Failure) -> None:
            for sample in wanted[url]:
                if isinstance(outcome, Failure):
                    result.fail_row(sample.key, sample.row, url, outcome.reason, outcome.detail)
                else:
                    _write_sample(tar, sample, outcome)
                    result.rows.fetched += 1
                    result.image_bytes += outcome.size

        await client.fetch_each(wanted, store)
    return result


def _samples(chunk: Chunk, config: CaptionsInput, result: Result) -> Iterator[_Sample]:
    """The rows that can become samples; the others are failures in `result`."""
    keys: set[str] = set()
    for number, row in enumerate(chunk.rows, chunk.first_row):
        result.rows.read += 1
        key, url = f"{number:010d}", ""
        try:
            record = row()
            url = _text(record, config.url)
            key = key_of(record, config.key, number)
            sample = _sample(record, config, key, number, url)
            if sample.key in keys:
                raise RowError("duplicate_key", "an earlier row of the same output file has this key")
        except RowError as error:
            result.fail_row(key, number, url, error.reason, error.detail)
            continue
        keys.add(sample.key)
        yield sample


def _sample(record: Record, config: CaptionsInput, key: str, number: int, url: str) -> _Sample:
    caption = _text(record, config.caption) if config.caption else ""
    if not url:
        raise RowError("no_url", f"column {config.url!r} holds no text")
    if config.caption and not caption:
        raise RowError("no_caption", f"column {config.caption!r} holds no text")
    # A member's key ends at the first dot of its name, and a slash begins a folder.
    name = quote(key, safe="").replace(".", "%2E")
    if len(name) > MAX_KEY_CHARACTERS:
        raise RowError("key_too_long", f"{len(name)} characters as a file name, limit {MAX_KEY_CHARACTERS}")
    return _Sample(name, number, url, caption, plain(record))


def _text(record: Record, column: str) -> str:
    value = record.get(column)
    return value.strip() if isinstance(value, str) else ""


def _write_sample(tar: tarfile.TarFile, sample: _Sample, body: Body) -> None:
    body.file.seek(0)
    _add(tar, f"{sample.key}.{body.extension}", body.file, body.size)
    if sample.caption:
        caption = sample.caption.encode()
        _add(tar, f"{sample.key}.txt", io.BytesIO(caption), len(caption))
    about = {"key": sample.key, "url": sample.url, "sha256": body.sha256, "row": sample.record}
    line = json.dumps(about, allow_nan=False).encode()
    _add(tar, f"{sample.key}.json", io.BytesIO(line), len(line))


def _add(tar: tarfile.TarFile, name: str, content: IO[bytes], size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size = size
    tar.addfile(member, content)
