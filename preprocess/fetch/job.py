"""The job: chunks of the inputs -> files that are complete or absent, an account that balances, one command.

    OUTPUT/tars/00000.tar          the chunk is done when this file is there; of other kinds it is
                                   documents/00000.parquet or conversations/00000.jsonl.zst
    OUTPUT/chunks/identity.json    settings and inputs whose work lies here
    OUTPUT/chunks/00000.json       counts of a chunk      chunks/00000.parquet   its failures
    OUTPUT/failures.parquet        all failures: key, row, position, url, reason, detail
    OUTPUT/fetch.json              written last: all chunks are there

A chunk's file is renamed into place after its counts and failures are on disk, so a run may be killed at any
moment; the same command skips what is there. Slices (`--shard 3/16`) take every 16th chunk, into one output; the
one that finds all chunks done writes the last two files. OUTPUT may be in a store: files appear there whole, when
their work on this machine is done.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import tempfile
import time
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.live import Live
from rich.text import Text

from preprocess.fetch.account import FAILURE_SCHEMA, Result, write_failures
from preprocess.fetch.captions import fetch_captions
from preprocess.fetch.client import Client, open_client
from preprocess.fetch.config import FetchConfig
from preprocess.fetch.conversations import fetch_conversations
from preprocess.fetch.documents import fetch_documents
from preprocess.fetch.tables import Chunk, iter_chunks, list_inputs
from preprocess.identity import IDENTITY, claim
from preprocess.inputs import REQUESTS, file_states
from shared.config import to_dict, to_toml
from shared.errors import UserError
from shared.files import (
    allow_open_files,
    atomic_path,
    exists,
    file_size,
    list_files,
    lock_directory,
    read_json,
    remove,
    remove_temporaries,
    write_json,
)
from shared.remote import as_path, is_remote, shown
from shared.remote_lock import STALE_SECONDS
from shared.tables import read_table

CHUNKS = "chunks"
# The next file is begun while the last fetches of the one before it are still waited for.
OPEN_CHUNKS = 2


@dataclass(frozen=True, slots=True)
class Kind:
    """What becomes of the chunks of one kind of input: files DIRECTORY/00000.EXTENSION.

    counted: what `max_failure_rate` is a share of.
    """

    directory: str
    extension: str
    counted: Literal["rows", "images"]
    fetch: Callable[[Chunk, Any, Client, Path], Awaitable[Result]]


KINDS = {
    "captions": Kind("tars", "tar", "rows", fetch_captions),
    "interleaved": Kind("documents", "parquet", "images", fetch_documents),
    "chat": Kind("conversations", "jsonl.zst", "images", fetch_conversations),
}


def run_fetch(config: FetchConfig) -> dict[str, Any]:
    """Fetch this slice; go on where an earlier run stopped. The record that fetch.json holds, or the slice's.

    Raises:
        UserError: of the config, the inputs or the output; or too much failed.
    """
    files = list_inputs(config.input)
    output = as_path(config.output)
    number, slices = config.slice
    _allow_connections(config.http.connections)
    with lock_directory(output / "locks" / f"{number}-of-{slices}", "fetching this slice"):
        with _one_at_a_time(output / "locks" / "claim"):
            _claim(config, files)
        job = _Job(config)
        try:
            asyncio.run(job.run(files))
        except BaseExceptionGroup as group:
            raise _first(group) from None
        return job.finish()


@contextmanager
def _one_at_a_time(path: Path) -> Generator[None]:
    """Slices that are started together wait for each other here; where there are no locks, start one first."""
    if not is_remote(path):
        with open(path, "a") as file:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
        return
    # A lock in a store does not wait; one whose owner is gone is taken over in STALE_SECONDS.
    last = time.monotonic() + 2 * STALE_SECONDS
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(lock_directory(path, "starting"))
                break
            except UserError:
                if time.monotonic() > last:
                    raise
                time.sleep(random.uniform(0.1, 0.5))
        yield


def _claim(config: FetchConfig, files: Sequence[str]) -> None:
    output = as_path(config.output)
    settings = to_dict(config)
    identity = {
        "inputs": [[path, *state] for path, state in zip(files, file_states(files), strict=True)],
        "slices": config.slice[1],
        **{name: settings[name] for name in ("input", "rows_per_file", "policy")},
    }
    path = output / CHUNKS / IDENTITY
    if config.on_change == "rebuild" and exists(path) and read_json(path) != identity:
        for name in ("fetch.json", "failures.parquet"):  # first: they speak for the files
            remove(output / name)
    stale = (CHUNKS, *(kind.directory for kind in KINDS.values()))
    claim(output, CHUNKS, identity, stale=stale, on_change=config.on_change)
    with atomic_path(output / "config.toml") as temporary:
        temporary.write_text(to_toml(config), encoding="utf-8")


class _Job:
    """One process's work on one output."""

    def __init__(self, config: FetchConfig) -> None:
        self._config = config
        self._output = as_path(config.output)
        self._kind = KINDS[config.input.kind]
        self._files, self._chunks = self._output / self._kind.directory, self._output / CHUNKS
        self._there = (
            self._listed()
        )  # names of the files that are done, asked for once: of our slice, only we add any
        self._done = Result()  # this slice's finished chunks
        self._num_chunks = self._num_rows = 0
        # On the output's disk, where it has one: /tmp may be memory.
        self._bodies = Path(tempfile.gettempdir()) if is_remote(self._output) else self._chunks
        for directory in () if is_remote(self._output) else (self._files, self._chunks):
            directory.mkdir(parents=True, exist_ok=True)

    async def run(self, files: Sequence[str]) -> None:
        chunks = iter_chunks(files, self._config.input, self._config.rows_per_file)
        free = asyncio.Semaphore(OPEN_CHUNKS)
        number, slices = self._config.slice
        for result in self._results(n for n in self._numbers() if n % slices == number - 1):
            self._done.add(result)

        async def work(chunk: Chunk, client: Client) -> None:
            try:
                await self._make(chunk, client)
            finally:
                free.release()

        async with open_client(self._config.policy, self._config.http, self._bodies) as client:
            with _progress(client):
                async with asyncio.TaskGroup() as group:
                    while True:
                        await free.acquire()
                        chunk = await asyncio.to_thread(next, chunks, None)
                        if chunk is None:
                            break
                        if self._is_ours(chunk):
                            group.create_task(work(chunk, client))
                        else:
                            free.release()

    def _listed(self) -> set[str]:
        return {path.name for path in list_files(self._files, f"*.{self._kind.extension}")}

    def _numbers(self) -> list[int]:
        """Of the chunks that are done."""
        return sorted(int(name.partition(".")[0]) for name in self._there)

    def _is_ours(self, chunk: Chunk) -> bool:
        """Whether there is work to do; counts the chunk."""
        self._num_chunks += 1
        self._num_rows += len(chunk.rows)
        number, slices = self._config.slice
        return chunk.number % slices == number - 1 and self._path(chunk.number).name not in self._there

    async def _make(self, chunk: Chunk, client: Client) -> None:
        path, config = self._path(chunk.number), self._config
        for directory in (self._files, self._chunks):
            remove_temporaries(directory, f"{chunk.number:05d}.*")
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_path(path))
            result = await self._kind.fetch(chunk, config.input, client, temporary)
            result.check()
            self._done.add(result)
            self._check_ceiling()
            await asyncio.to_thread(self._write_rest, chunk.number, result, temporary)
            await asyncio.to_thread(stack.pop_all().close)  # renamed, or copied to a store

    def _write_rest(self, number: int, result: Result, temporary: Path) -> None:
        with atomic_path(self._failures(number)) as path:
            write_failures(path, result.failures)
        write_json(self._counts(number), result.as_dict())
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # here, in a thread: the rename that follows then has little to wait for

    def _check_ceiling(self) -> None:
        account = getattr(self._done, self._kind.counted)
        failed, ceiling = account.failed.total(), self._config.max_failure_rate
        if failed > ceiling * account.read:
            reasons = ", ".join(f"{name} {count}" for name, count in account.failed.most_common(5))
            raise UserError(
                f"{shown(self._output)}: {failed} of {account.read} failed ({reasons}), more than max_failure_rate "
                f"{ceiling}; this file was not kept: look at the network, or raise the ceiling"
            )

    def _path(self, number: int) -> Path:
        return self._files / f"{number:05d}.{self._kind.extension}"

    def _counts(self, number: int) -> Path:
        return self._chunks / f"{number:05d}.json"

    def _failures(self, number: int) -> Path:
        return self._chunks / f"{number:05d}.parquet"

    def _mend(self, number: int) -> str:
        return f"delete {shown(self._path(number))} and run again"

    def _results(self, numbers: Iterable[int]) -> Iterator[Result]:
        """Counts of chunks that are done, many asked for at a time."""
        with ThreadPoolExecutor(REQUESTS) as pool:
            yield from pool.map(self._result, numbers)

    def _result(self, number: int) -> Result:
        return Result.from_dict(read_json(self._counts(number), mend=self._mend(number)))

    def finish(self) -> dict[str, Any]:
        """Write what speaks for the whole output, if all chunks are there; else the slice's own counts."""
        if not self._num_chunks:
            raise UserError("input: the files hold no row; correct input.paths")
        paths = [self._path(number) for number in range(self._num_chunks)]
        self._there = self._listed()
        missing = sum(path.name not in self._there for path in paths)
        if missing:
            return {
                "complete": False,
                "files_missing": missing,
                "slice": self._config.shard,
            } | self._done.as_dict()
        total = Result()
        files: list[dict[str, Any]] = []
        with ThreadPoolExecutor(REQUESTS) as pool:
            sizes = pool.map(file_size, paths)
            for path, size, result in zip(paths, sizes, self._results(range(len(paths))), strict=True):
                total.add(result)
                name = f"{self._kind.directory}/{path.name}"
                files.append({"name": name, "bytes": size, **result.as_dict()})
        total.check()
        if total.rows.read != self._num_rows:
            raise RuntimeError(f"rows: the files hold {total.rows.read}, the inputs {self._num_rows}")
        self._merge_failures()
        record = {"complete": True, "kind": self._config.input.kind, **total.as_dict()}
        write_json(self._output / "fetch.json", {**record, "files": files})
        return record

    def _merge_failures(self) -> None:
        def read(number: int) -> pa.Table:
            return read_table(self._failures(number), self._mend(number), schema=FAILURE_SCHEMA)

        with (
            atomic_path(self._output / "failures.parquet") as path,
            pq.ParquetWriter(path, FAILURE_SCHEMA, compression="zstd", write_page_checksum=True) as writer,
            ThreadPoolExecutor(REQUESTS) as pool,
        ):
            for first in range(
                0, self._num_chunks, REQUESTS
            ):  # no more in memory than are asked for at a time
                for table in pool.map(read, range(self._num_chunks)[first : first + REQUESTS]):
                    writer.write_table(table)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error of a group that a person can mend, or the first one."""
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves.append(_first(error) if isinstance(error, BaseExceptionGroup) else error)
    return next((error for error in leaves if isinstance(error, UserError)), leaves[0])


def _allow_connections(connections: int) -> None:
    """Each connection is a socket, and at most one body on disk.

    Raises:
        UserError: the system's hard limit is too low.
    """
    needed = 2 * connections + 128
    if (limit := allow_open_files(needed)) is not None:
        raise UserError(
            f"http.connections {connections} needs {needed} open files, the limit is {limit}; lower it"
        )


@contextmanager
def _progress(client: Client) -> Generator[None]:
    """A line for people; nothing where standard error is not a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    begin = time.monotonic()

    def line() -> Text:
        fetched, tried = client.outcomes["fetched"], client.outcomes.total()
        speed = tried / max(time.monotonic() - begin, 0.1)
        return Text(f"fetch  {fetched:,} pictures, {tried - fetched:,} failed, {speed:.0f} URLs/s")

    with Live(get_renderable=line, console=console, refresh_per_second=2):
        yield
