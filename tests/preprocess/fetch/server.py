"""A real HTTP server on loopback that behaves as badly as its URL says; raw sockets, so that nothing corrects it."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from urllib.parse import parse_qs, unquote, urlsplit

from tests.preprocess.inputs import png

PICTURE = png(5, 7)
# A picture that unpacks to 64 MiB from 64 KB.
BOMB = gzip.compress(PICTURE + bytes(64 << 20), 9)


class Server:
    """Started by `serving`. `requests` counts paths; `open_most` is the most requests at one time."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.headers: list[str] = []
        self.times: dict[str, float] = {}  # of the first request
        self.open_now = self.open_most = 0
        self.sent_bytes = 0
        self.connections = 0
        self.obeys = True  # "Connection: close"; else it waits for the client
        self.files: dict[str, bytes] = {}  # by path, served as they are
        self.port = 0

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                target = head.split(" ")[1]
                self.requests[target] += 1
                self.headers.append(head)
                self.times.setdefault(target, time.monotonic())
                self.open_now += 1
                self.open_most = max(self.open_most, self.open_now)
                try:
                    keep = await self.answer(target, writer)
                finally:
                    self.open_now -= 1
                if not keep or (self.obeys and "connection: close" in head.lower()):
                    break
        writer.close()

    async def answer(self, target: str, writer: asyncio.StreamWriter) -> bool:
        split = urlsplit(target)
        query = {name: values[-1] for name, values in parse_qs(split.query).items()}
        kind = split.path.split("/")[1]
        if target in self.files:
            body = self.files[target]
            await self.send(writer, 200, [f"Content-Length: {len(body)}"], body)
            return True
        special: dict[str, Callable[[asyncio.StreamWriter], Awaitable[None]]] = {
            "silent": self.silent,
            "drip": self.drip,
            "endless": self.endless,
            "reset": self.reset,
            "reset-later": self.reset_later,
        }
        if kind in special:
            await special[kind](writer)
            return False
        if kind == "slow":
            await asyncio.sleep(float(query["s"]))
        status, headers, body = self.response(kind, target, query)
        await self.send(writer, status, headers, body)
        return kind not in ("cut", "cut-chunked", "bad-chunk", "no-length")

    def response(self, kind: str, target: str, query: dict[str, str]) -> tuple[int, list[str], bytes]:
        """Status, header lines, and all bytes that follow them."""
        image, body, length = ["Content-Type: image/png"], PICTURE, [f"Content-Length: {len(PICTURE)}"]
        chunk = b"%x\r\n%s\r\n" % (len(body), body)
        seen = self.requests[target]
        if kind in ("ok", "slow"):
            return 200, image + length, body
        if kind == "status":
            return int(query["code"]), [] if query["code"] in ("204", "304") else ["Content-Length: 0"], b""
        if kind == "fails-first":  # as often as `times`
            late = [f"Retry-After: {query['after']}"] if "after" in query else []
            if seen <= int(query["times"]):
                return int(query["code"]), [*late, "Content-Length: 0"], b""
            return 200, image + length, body
        if kind == "to":
            return 302, [f"Location: {unquote(query['url'])}", "Content-Length: 0"], b""
        if kind == "robots":
            tags = [f"X-Robots-Tag: {tag}" for tag in query["tag"].split("|")]
            return 200, image + length + tags, body
        if kind == "typed":  # Content-Type as asked, body as asked
            body = query["body"].encode() if "body" in query else body
            types = [f"Content-Type: {query['type']}"] if query.get("type") else []
            return 200, [*types, f"Content-Length: {len(body)}"], body
        if kind == "encoded":
            body = {"gzip": gzip.compress(body), "cut": gzip.compress(body)[:-9], "bomb": BOMB}.get(
                query["how"], body
            )
            lines = [f"Content-Encoding: {query['name']}", f"Content-Length: {len(body)}"]
            return 200, image + lines, body
        others = {
            "claims": (200, [*image, "Content-Length: 99999999999"], body),
            "cut": (200, [*image, f"Content-Length: {len(body) + 500}"], body),
            "chunked": (200, [*image, "Transfer-Encoding: chunked"], chunk + b"0\r\n\r\n"),
            "cut-chunked": (200, [*image, "Transfer-Encoding: chunked"], chunk),
            "bad-chunk": (200, [*image, "Transfer-Encoding: chunked"], b"zz\r\nnothing"),
            "no-length": (200, image, body),
            "empty": (200, [*image, "Content-Length: 0"], b""),
            "loop": (302, [f"Location: {target}", "Content-Length: 0"], b""),
        }
        return others[kind]

    async def send(self, writer: asyncio.StreamWriter, status: int, headers: list[str], body: bytes) -> None:
        head = "\r\n".join([f"HTTP/1.1 {status} Something", *headers, "", ""])
        writer.write(head.encode() + body)
        await writer.drain()

    async def silent(self, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(30)

    async def drip(self, writer: asyncio.StreamWriter) -> None:
        """One byte at a time: never silent, never done."""
        await self.send(writer, 200, ["Content-Type: image/png", "Content-Length: 100000"], PICTURE)
        for _ in range(1000):
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.05)

    async def endless(self, writer: asyncio.StreamWriter) -> None:
        await self.send(writer, 200, ["Content-Type: image/png"], PICTURE)
        while True:
            writer.write(bytes(1 << 16))
            self.sent_bytes += 1 << 16
            await writer.drain()

    async def reset_later(self, writer: asyncio.StreamWriter) -> None:
        await self.send(writer, 200, ["Content-Type: image/png", "Content-Length: 100000"], PICTURE)
        await asyncio.sleep(0.05)  # so that the beginning arrives
        await self.reset(writer)

    async def reset(self, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()


@contextlib.contextmanager
def serving(tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    server, ready = Server(), threading.Event()
    loop = asyncio.new_event_loop()

    async def listen() -> asyncio.Server:
        listener = await asyncio.start_server(server.handle, "127.0.0.1", 0, limit=1 << 20, ssl=tls)
        server.port = listener.sockets[0].getsockname()[1]
        return listener

    def run() -> None:
        listener = loop.run_until_complete(listen())
        ready.set()
        loop.run_forever()
        listener.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
