"""`preprocess fetch` against a local server: pictures per second, and memory whatever the size of the table.

    python benchmarks/fetch.py
    python benchmarks/fetch.py --conversations

The server runs in its own process and answers at every address of 127.0.0.0/8, so that each picture can have a
host of its own, as in web tables; it waits before each answer, `latency` on average and up to twice as long. The
baseline is the shape of img2dataset's downloader, rebuilt from its description: a pool of as many threads, `urllib`,
bytes into the same kind of tar; it checks no address, size, type or opt-out. The two run in turn.

With --conversations: `kind = "chat"` beside `kind = "captions"` on the same URLs, what their files take, and how fast
the chat source's reader gets the pictures back, from these files and from a Parquet table of bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import multiprocessing
import random
import resource
import ssl
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from preprocess.fetch.config import CaptionsInput, ChatInput, FetchConfig, HttpConfig, Input, Policy
from preprocess.fetch.job import run_fetch
from preprocess.samples import Media
from preprocess.sources.pictures import picture
from preprocess.sources.records import Record, read_records

CASES = [  # pictures, seconds before an answer, hosts
    (2000, 0.0, 1),
    (2000, 0.0, 2000),
    (4000, 0.1, 4000),
    (16000, 0.1, 16000),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--picture_bytes", type=int, default=50_000)
    parser.add_argument("--connections", type=int, default=256)
    parser.add_argument("--conversations", action="store_true", help="pictures of conversations")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    if options.conversations:
        compare_conversations(options.picture_bytes, options.connections, options.json)
        return
    rows = [measure(*case, options.picture_bytes, options.connections) for case in CASES]
    print(f"{options.picture_bytes} bytes per picture, {options.connections} connections or threads")
    for row in rows:
        ours, threads = row["fetch"], row["threads"]
        print(
            f"{row['pictures']:6} pictures, {row['hosts']:5} hosts, {row['latency_s'] * 1000:3.0f} ms: "
            f"{ours['per_s']:5.0f}/s, {ours['cpu_ms']:.2f} ms of CPU each, {ours['peak_mb']:4.0f} MB; "
            f"threads {threads['per_s']:5.0f}/s, {threads['cpu_ms']:.2f} ms, {threads['peak_mb']:4.0f} MB"
        )
    if options.json:
        print(json.dumps({"picture_bytes": options.picture_bytes, "rows": rows}))


def measure(pictures: int, latency_s: float, hosts: int, size: int, connections: int) -> dict[str, Any]:
    with (
        serving(pictures, latency_s, hosts, size) as urls,
        tempfile.TemporaryDirectory() as directory,
    ):
        arguments = (urls, Path(directory), connections, hosts)
        figures = {
            "fetch": in_process(fetch, *arguments),
            "threads": in_process(fetch_in_threads, *arguments),
        }
    return {"pictures": pictures, "latency_s": latency_s, "hosts": hosts, **figures}


def compare_conversations(size: int, connections: int, as_json: bool) -> None:
    pictures = 4000
    with serving(pictures, 0.0, pictures, size) as urls, tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        figures = {
            kind: in_process(function, urls, directory, connections, pictures)
            for kind, function in (("captions", fetch), ("chat", fetch_conversations))
        }
        lines = sorted((directory / "chat" / "conversations").iterdir())
        stored = {
            "captions": sum(path.stat().st_size for path in (directory / "out" / "tars").iterdir()),
            "chat": sum(path.stat().st_size for path in lines),
        }
        rows = [{"image": {"bytes": decoded(path)}} for path in records_of(lines)]
        pq.write_table(
            pa.Table.from_pylist(rows), directory / "a.parquet", compression="none", use_dictionary=False
        )
        del rows
        read = {"chat": read_back(lines), "Parquet": read_back([directory / "a.parquet"])}
    total = pictures * size
    print(f"{pictures} pictures of {size} bytes, {pictures} hosts, {connections} connections")
    for kind, found in figures.items():
        print(
            f"{kind:8} {found['per_s']:5.0f}/s, {found['cpu_ms']:.2f} ms of CPU each, {found['peak_mb']:4.0f} MB; "
            f"{stored[kind] / total:.3f} bytes stored per byte"
        )
    for kind, seconds in read.items():
        print(f"read from {kind:7} {total / seconds / 1e6:5.0f} MB of pictures per second of CPU")
    if as_json:
        print(json.dumps({"picture_bytes": size, "fetch": figures, "stored": stored, "read_cpu_s": read}))


def records_of(paths: list[Path]) -> Iterator[dict[str, Any]]:
    for path in paths:
        yield from (entry.value for entry in read_records(str(path)) if isinstance(entry, Record))


def decoded(record: dict[str, Any]) -> bytes:
    found = picture(record["image"], "")
    assert isinstance(found, Media), found
    return found.file.read()


def read_back(paths: list[Path]) -> float:
    """Seconds of CPU."""
    begin = time.process_time()
    for record in records_of(paths):
        decoded(record)
    return time.process_time() - begin


@contextmanager
def serving(pictures: int, latency_s: float, hosts: int, size: int) -> Generator[list[str]]:
    """URLs of a server in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(theirs, latency_s, size), daemon=True)
    server.start()
    port = ours.recv()
    urls = [f"http://127.{n % hosts // 250}.{n % hosts % 250}.1:{port}/{n}" for n in range(pictures)]
    yield [url.replace("127.0.0.1", "127.0.1.1") for url in urls]
    server.terminate()


def in_process(function: Callable[..., None], urls: list[str], *arguments: Any) -> dict[str, float]:
    """A function's figures in a fresh process, without the start of it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=timed, args=(theirs, function, urls, *arguments))
    child.start()
    seconds, cpu_s, peak_mb = ours.recv()
    child.join()
    return {"per_s": len(urls) / seconds, "cpu_ms": 1000 * cpu_s / len(urls), "peak_mb": peak_mb}


def timed(pipe: Connection, function: Callable[..., None], *arguments: Any) -> None:
    begin, cpu = time.perf_counter(), time.process_time()
    function(*arguments)
    seconds, cpu_s = time.perf_counter() - begin, time.process_time() - cpu
    pipe.send((seconds, cpu_s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000))


def fetch(urls: list[str], directory: Path, connections: int, hosts: int) -> None:
    table = directory / "urls.jsonl"
    table.write_text("".join(json.dumps({"url": url, "caption": "a picture"}) + "\n" for url in urls))
    source = CaptionsInput(kind="captions", paths=(str(table),))
    record = run_fetch(config_of(directory / "out", source, connections, hosts))
    assert record["rows"]["fetched"] == len(urls), record


def fetch_conversations(urls: list[str], directory: Path, connections: int, hosts: int) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a picture"}]
    path = directory / "chat.jsonl"
    path.write_text("".join(json.dumps({"image": url, "conversations": turns}) + "\n" for url in urls))
    source = ChatInput(kind="chat", paths=(str(path),))
    record = run_fetch(config_of(directory / "chat", source, connections, hosts))
    assert record["images"]["fetched"] == len(urls), record


def config_of(output: Path, source: Input, connections: int, hosts: int) -> FetchConfig:
    return FetchConfig(
        output=str(output),
        input=source,
        policy=Policy(allow_addresses=("127.0.0.0/8",)),
        http=HttpConfig(connections=connections, connections_per_host=connections if hosts == 1 else 4),
    )


def fetch_in_threads(urls: list[str], directory: Path, connections: int, hosts: int) -> None:
    context = ssl.create_default_context()

    def get(url: str) -> bytes:
        with urllib.request.urlopen(url, timeout=10, context=context) as response:
            return response.read()

    for start in range(0, len(urls), 2000):
        with (
            tarfile.open(directory / f"{start}.tar", "w") as tar,
            ThreadPoolExecutor(connections) as pool,
        ):
            for number, data in enumerate(pool.map(get, urls[start : start + 2000])):
                for kind, content in (("jpg", data), ("txt", b"a picture"), ("json", b"{}")):
                    member = tarfile.TarInfo(f"{start + number:010d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


class Answer(asyncio.Protocol):
    """One picture per request, after a wait: a stretch of `noise`, so that no two are alike."""

    def __init__(self, latency_s: float, head: bytes, noise: memoryview, size: int) -> None:
        self._latency_s, self._head, self._noise, self._size = latency_s, head, noise, size

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        close = b"connection: close" in data.lower()
        asyncio.get_running_loop().call_later(2 * self._latency_s * random.random(), self._answer, close)

    def _answer(self, close: bool) -> None:
        transport: Any = self._transport
        if not transport.is_closing():
            start = random.randrange(len(self._noise) - self._size)
            transport.write(self._head + self._noise[start : start + self._size])
            if close:
                transport.close()


def serve(pipe: Connection, latency_s: float, size: int) -> None:
    noise = memoryview(np.random.default_rng(0).bytes(1000 * size))
    head = f"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {size}\r\n\r\n".encode()
    head += b"\xff\xd8\xff"

    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: Answer(latency_s, head, noise, size - 3), "0.0.0.0", 0, backlog=4096
        )
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


if __name__ == "__main__":
    main()
