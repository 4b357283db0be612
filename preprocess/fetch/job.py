"""The job: chunks of the inputs -> files that are complete or absent, an account that balances, one command.

    OUTPUT/tars/00000.tar          or documents/00000.parquet: the chunk is done when this file is there
    OUTPUT/chunks/identity.json    settings and inputs whose work lies here
    OUTPUT/chunks/00000.json       counts of a chunk      chunks/00000.parquet   its failures
    OUTPUT/failures.parquet        all failures: key, row, position, url, reason, detail
    OUTPUT/fetch.json              written last: all chunks are there

A chunk's file is renamed into place after its counts and failures are on disk, so a run may be killed at any
moment; the same command skips what is there. Slices (`--shard 3/16`) take every 16th chunk, into one output; the
one that finds all chunks done writes the last two files.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.live import Live
from rich.text import Text

from preprocess.fetch.account import FAILURE_SCHEMA, Result, write_failures
from preprocess.fetch.captions import fetch_captions
from preprocess.fetch.client import Client, open_client
from preprocess.fetch.config import CaptionsInput, FetchConfig
from preprocess.fetch.documents import fetch_documents
from preprocess.fetch.tables import Chunk, iter_chunks, list_inputs
from preprocess.identity import IDENTITY, claim
from preprocess.inputs import file_states
from shared.config import to_dict, to_toml
from shared.errors import UserError
from shared.files import (
    allow_open_files,
    atomic_path,
    lock_directory,
    read_json,
    remove_temporaries,
    write_json,
)
from shared.remote import as_path, is_remote

CHUNKS, TARS, DOCUMENTS = "chunks", "tars", "documents"
# The next file is begun while the last fetches of the one before it are still waited for.
OPEN_CHUNKS = 2


def run_fetch(config: FetchConfig) -> dict[str, Any]:
    """Fetch this slice; go on where an earlier run stopped. The record that fetch.json holds, or the slice's.

    Raises:
        UserError: of the config, the inputs or the output; or too much failed.
    """
    if is_remote(config.output):
        raise UserError(
            f"output {config.output}: fetch writes to a directory of this machine; copy it from there"
        )
    files = list_inputs(config.input.paths)
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
    with open(path, "a") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
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
    if config.on_change == "rebuild" and path.exists() and read_json(path) != identity:
        for name in ("fetch.json", "failures.parquet"):  # first: they speak for the files
            (output / name).unlink(missing_ok=True)
    claim(output, CHUNKS, identity, stale=(CHUNKS, TARS, DOCUMENTS), on_change=config.on_change)
    with atomic_path(output / "config.toml") as temporary:
        temporary.write_text(to_toml(config), encoding="utf-8")


class _Job:
    """One process's work on one output."""

    def __init__(self, config: FetchConfig) -> None:
        self._config = config
        self._output = as_path(config.output)
        self._captions = isinstance(config.input, CaptionsInput)
        self._done = Result()  # this slice's finished chunks
        self._num_chunks = self._num_rows = 0
        for name in (CHUNKS, TARS if self._captions else DOCUMENTS):
            (self._output / name).mkdir(parents=True, exist_ok=True)

    async def run(self, files: Sequence[str]) -> None:
        chunks = iter_chunks(files, self._config.input, self._config.rows_per_file)
        free = asyncio.Semaphore(OPEN_CHUNKS)

        async def work(chunk: Chunk, client: Client) -> None:
            try:
                await self._make(chunk, client)
            finally:
                free.release()

        bodies = self._output / CHUNKS  # on the output's disk: /tmp may be memory
        async with open_client(self._config.policy, self._config.http, bodies) as client:
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

    def _is_ours(self, chunk: Chunk) -> bool:
        """Whether there is work to do; counts the chunk."""
        self._num_chunks += 1
        self._num_rows += len(chunk.rows)
        number, slices = self._config.slice
        if chunk.number % slices != number - 1:
            return False
        done = self._path(chunk.number).exists()
        if done:
            self._done.add(self._result(chunk.number))
        return not done

    async def _make(self, chunk: Chunk, client: Client) -> None:
        path, config = self._path(chunk.number), self._config
        for directory in (path.parent, self._output / CHUNKS):
            remove_temporaries(directory, f"{chunk.number:05d}.*")
        with atomic_path(path) as temporary:
            if isinstance(config.input, CaptionsInput):
                result = await fetch_captions(chunk, config.input, client, temporary)
            else:
                result = await fetch_documents(chunk, config.input, client, temporary)
            result.check()
            self._done.add(result)
            self._check_ceiling()
            await asyncio.to_thread(self._write_rest, chunk.number, result, temporary)

    def _write_rest(self, number: int, result: Result, temporary: Path) -> None:
        with atomic_path(self._failures(number)) as path:
            write_failures(path, result.failures)
        write_json(self._counts(number), result.as_dict())
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # here, in a thread: the rename that follows then has little to wait for

    def _check_ceiling(self) -> None:
        account = self._done.rows if self._captions else self._done.images
        failed, ceiling = account.failed.total(), self._config.max_failure_rate
        if failed > ceiling * account.read:
            reasons = ", ".join(f"{name} {count}" for name, count in account.failed.most_common(5))
            raise UserError(
                f"{self._output}: {failed} of {account.read} failed ({reasons}), more than max_failure_rate {ceiling}; "
                "this file was not kept: look at the network, or raise the ceiling"
            )

    def _path(self, number: int) -> Path:
        name = f"{TARS}/{number:05d}.tar" if self._captions else f"{DOCUMENTS}/{number:05d}.parquet"
        return self._output / name

    def _counts(self, number: int) -> Path:
        return self._output / CHUNKS / f"{number:05d}.json"

    def _failures(self, number: int) -> Path:
        return self._output / CHUNKS / f"{number:05d}.parquet"

    def _result(self, number: int) -> Result:
        mend = f"delete {self._path(number)} and run again"
        return Result.from_dict(read_json(self._counts(number), mend=mend))

    def finish(self) -> dict[str, Any]:
        """Write what speaks for the whole output, if all chunks are there; else the slice's own counts."""
        if not self._num_chunks:
            raise UserError("input: the files hold no row; correct input.paths")
        missing = sum(not self._path(number).exists() for number in range(self._num_chunks))
        if missing:
            return {
                "complete": False,
                "files_missing": missing,
                "slice": self._config.shard,
            } | self._done.as_dict()
        total = Result()
        files: list[dict[str, Any]] = []
        for number in range(self._num_chunks):
            total.add(result := self._result(number))
            name = str(self._path(number).relative_to(self._output))
            files.append({"name": name, "bytes": self._path(number).stat().st_size, **result.as_dict()})
        total.check()
        if total.rows.read != self._num_rows:
            raise RuntimeError(f"rows: the files hold {total.rows.read}, the inputs {self._num_rows}")
        self._merge_failures()
        record = {"complete": True, "kind": self._config.input.kind, **total.as_dict()}
        write_json(self._output / "fetch.json", {**record, "files": files})
        return record

    def _merge_failures(self) -> None:
        with (
            atomic_path(self._output / "failures.parquet") as path,
            pq.ParquetWriter(path, FAILURE_SCHEMA, compression="zstd", write_page_checksum=True) as writer,
        ):
            for number in range(self._num_chunks):
                writer.write_table(pq.read_table(self._failures(number)))


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
