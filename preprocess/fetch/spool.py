"""Bodies of a chunk back to back on disk, until the file that they belong to is written in the order of its rows."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from preprocess.fetch.client import Body, Client, Failure


@dataclass(frozen=True, slots=True)
class Place:
    """Where a body lies in the spool."""

    offset: int
    size: int


class Spool:
    """One unnamed file, which is gone when the process is; `outcomes` by URL."""

    def __init__(self, directory: Path) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=directory)
        self.outcomes: dict[str, Place | Failure] = {}

    def store(self, url: str, outcome: Body | Failure) -> None:
        if isinstance(outcome, Failure):
            self.outcomes[url] = outcome
            return
        self.outcomes[url] = Place(self._file.tell(), outcome.size)
        shutil.copyfileobj(outcome.file, self._file)

    def read(self, place: Place) -> bytes:
        self._file.seek(place.offset)
        return self._file.read(place.size)

    def close(self) -> None:
        self._file.close()


@asynccontextmanager
async def fetched(client: Client, urls: Iterable[str], directory: Path) -> AsyncGenerator[Spool, None]:
    """What came of each URL, asked for once however often it is named; gone at the end."""
    spool = Spool(directory)
    try:
        await client.fetch_each(dict.fromkeys(urls), spool.store)
        yield spool
    finally:
        spool.close()
