"""`preprocess fetch` against a local server: pictures per second, and memory whatever the size of the table.

    python benchmarks/fetch.py

The server runs in its own process and answers at every address of 127.0.0.0/8, so that each picture can have a
host of its own, as in web tables; it waits before each answer, `latency` on average and up to twice as long. The
baseline is the shape of img2dataset's downloader, rebuilt from its description: a pool of as many threads, `urllib`,
bytes into the same kind of tar; it checks no address, size, type or opt-out. The two run in turn.
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.fetch.config import CaptionsInput, FetchConfig, HttpConfig, Policy
from preprocess.fetch.job import run_fetch

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
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
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
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(theirs, latency_s, size), daemon=True)
    server.start()
    port = ours.recv()
    urls = [f"http://127.{n % hosts // 250}.{n % hosts % 250}.1:{port}/{n}" for n in range(pictures)]
    urls = [url.replace("127.0.0.1", "127.0.1.1") for url in urls]
    with tempfile.TemporaryDirectory() as directory:
        arguments = (urls, Path(directory), connections, hosts)
        figures = {
            "fetch": in_process(fetch, *arguments),
            "threads": in_process(fetch_in_threads, *arguments),
        }
    server.terminate()
    return {"pictures": pictures, "latency_s": latency_s, "hosts": hosts, **figures}


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
    record = run_fetch(
        FetchConfig(
            output=str(directory / "out"),
            input=CaptionsInput(kind="captions", paths=(str(table),)),
            policy=Policy(allow_addresses=("127.0.0.0/8",)),
            http=HttpConfig(connections=connections, connections_per_host=connections if hosts == 1 else 4),
        )
    )
    assert record["rows"]["fetched"] == len(urls), record


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
    """One picture per request, after a wait."""

    def __init__(self, latency_s: float, response: bytes) -> None:
        self._latency_s, self._response = latency_s, response

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        close = b"connection: close" in data.lower()
        asyncio.get_running_loop().call_later(2 * self._latency_s * random.random(), self._answer, close)

    def _answer(self, close: bool) -> None:
        transport: Any = self._transport
        if not transport.is_closing():
            transport.write(self._response)
            if close:
                transport.close()


def serve(pipe: Connection, latency_s: float, size: int) -> None:
    body = b"\xff\xd8\xff" + np.random.default_rng(0).bytes(size - 3)
    head = f"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {size}\r\n\r\n".encode()

    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Answer(latency_s, head + body), "0.0.0.0", 0, backlog=4096)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


if __name__ == "__main__":
    main()
