"""One URL -> a body that was checked while it came in, or the reason why there is none.

    slots (per host, in all) -> address checked -> request -> headers checked -> bytes counted, seen, unpacked

At most `connections` requests are under way, and a connection is kept open only while others wait for its host, so
that this is also about the number of open sockets. A body beyond 1 MiB waits on disk: memory is at most about 1 MiB per
connection, whatever the servers send. No cookies, no proxies (an address behind a proxy cannot be checked), no
redirect that is not checked like the first URL.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import random
import ssl
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import aiohttp
from yarl import URL

from preprocess.fetch.addresses import RefusedAddressError, guarded_sockets
from preprocess.fetch.config import HttpConfig, Policy
from preprocess.fetch.responses import (
    SNIFF_BYTES,
    FetchError,
    open_inflater,
    opt_out_of,
    parse_url,
    retry_after_s,
    sniff,
)
from shared.errors import UserError

IN_MEMORY_BYTES = 1 << 20
PIECE_BYTES = 1 << 16
# Fetches begun beyond the connections: enough that a run of URLs of one busy host does not idle the others.
WAITING_PER_CONNECTION = 3
MAX_RESOLVERS = 64  # look-ups block a thread each

_PASSES = frozenset((408, 425, 429, 500, 502, 503, 504))
_REDIRECTS = frozenset((301, 302, 303, 307, 308))


@dataclass(slots=True)
class Body:
    """A picture: its bytes from the file's beginning, on disk or in memory."""

    file: IO[bytes]
    size: int
    sha256: str
    extension: str


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a URL gave no picture."""

    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Sessions:
    """One that keeps its connections for a moment, and one that closes each: asked to close, not all servers say so,
    and a kept connection that the server has closed costs a try."""

    keeping: aiohttp.ClientSession
    closing: aiohttp.ClientSession


class _Host:
    """What fetches from one host share."""

    def __init__(self, connections: int) -> None:
        self.free = asyncio.Semaphore(connections)
        self.rest_until = 0.0
        self.users = 0
        self.waiting = 0


class Client:
    """Fetches URLs under one policy; made by `open_client`."""

    def __init__(self, sessions: Sessions, policy: Policy, http: HttpConfig, directory: Path) -> None:
        self._sessions, self._policy, self._http, self._directory = sessions, policy, http, directory
        self._connections = asyncio.Semaphore(http.connections)
        self._begun = asyncio.Semaphore(http.connections * (1 + WAITING_PER_CONNECTION))
        self._hosts: dict[str, _Host] = {}
        # URLs by what became of them: "fetched", or the reason.
        self.outcomes: Counter[str] = Counter()

    async def fetch_each(self, urls: Iterable[str], store: Callable[[str, Body | Failure], None]) -> None:
        """Fetch URLs side by side and hand over each outcome as it comes; a body is gone after `store`."""

        async def fetch_one(url: str) -> None:
            try:
                outcome = await self.fetch(url)
                self.outcomes["fetched" if isinstance(outcome, Body) else outcome.reason] += 1
                if isinstance(outcome, Body):
                    with outcome.file:
                        store(url, outcome)
                else:
                    store(url, outcome)
            finally:
                self._begun.release()

        async with asyncio.TaskGroup() as group:
            for url in urls:
                await self._begun.acquire()
                group.create_task(fetch_one(url))

    async def fetch(self, url: str) -> Body | Failure:
        """One URL, tried again where that may help."""
        tries = 0
        try:
            target = parse_url(url)
            with self._host(target):  # kept over the waits between tries
                while True:
                    tries += 1
                    try:
                        return await self._try(target)
                    except FetchError as error:
                        if not error.again or tries > self._http.retries:
                            raise
                        await asyncio.sleep(self._wait_s(tries, error))
        except FetchError as error:
            detail = f"{error.detail}; {tries} tries" if tries > 1 else error.detail
            return Failure(error.reason, detail.removeprefix("; "))
        except (OSError, UserError):
            raise  # of this machine: a full disk says nothing of a URL
        except Exception as error:  # what the HTTP library did not foresee costs one URL, not the job
            return Failure("unexpected", f"{type(error).__name__}: {error}"[:200])

    def _wait_s(self, tries: int, error: FetchError) -> float:
        """Seconds until the next try. Raises: the error, when the server asks for more than we wait."""
        if error.after_s > self._http.max_backoff_s:
            raise error
        backoff_s = self._http.backoff_s * 2 ** (tries - 1) * random.uniform(0.5, 1.5)
        return max(min(backoff_s, self._http.max_backoff_s), error.after_s)

    async def _try(self, url: URL) -> Body:
        for _ in range(1 + self._http.max_redirects):
            async with self._request(url) as response:
                self._check_opt_out(response)
                if response.status not in _REDIRECTS or "Location" not in response.headers:
                    return await self._read(response)
                url = parse_url(response.headers["Location"], base=url)
        raise FetchError("too_many_redirects", f"more than {self._http.max_redirects}")

    @asynccontextmanager
    async def _request(self, url: URL) -> AsyncGenerator[aiohttp.ClientResponse]:
        with self._host(url) as host, _reasons():
            async with self._slot(host):
                session = self._sessions.keeping if host.waiting else self._sessions.closing
                async with session.get(url, allow_redirects=False) as response:
                    try:
                        yield response
                    except FetchError as error:
                        rest_s = min(error.after_s, self._http.max_backoff_s)
                        host.rest_until = max(host.rest_until, time.monotonic() + rest_s)
                        raise

    @contextmanager
    def _host(self, url: URL) -> Generator[_Host]:
        name = str(url.host)
        host = self._hosts.setdefault(name, _Host(self._http.connections_per_host))
        host.users += 1
        try:
            yield host
        finally:
            host.users -= 1
            if not host.users:
                del self._hosts[name]

    @asynccontextmanager
    async def _slot(self, host: _Host) -> AsyncGenerator[None]:
        """One of the host's connections, after the rest it asked for, and then one of all."""
        host.waiting += 1
        try:
            await host.free.acquire()
        finally:
            host.waiting -= 1
        try:
            while (rest_s := host.rest_until - time.monotonic()) > 0:
                await asyncio.sleep(rest_s)
            async with self._connections:
                yield
        finally:
            host.free.release()

    def _check_opt_out(self, response: aiohttp.ClientResponse) -> None:
        headers = response.headers.getall("X-Robots-Tag", [])
        directive = opt_out_of(headers, self._policy.opt_out, self._policy.user_agent_token)
        if directive is not None:
            raise FetchError("robots_opt_out", f"X-Robots-Tag: {directive}")

    async def _read(self, response: aiohttp.ClientResponse) -> Body:
        self._check_headers(response)
        limit = self._policy.max_bytes
        inflater = open_inflater(response.headers.get("Content-Encoding", ""), limit)
        file = tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES, dir=str(self._directory))
        try:
            digest, received, size, head, extension = hashlib.sha256(), 0, 0, b"", None
            async for piece in response.content.iter_chunked(PIECE_BYTES):
                received += len(piece)
                if received > limit:
                    raise FetchError("too_large", f"more than {limit} bytes")
                piece = inflater.feed(piece) if inflater else piece
                size += len(piece)
                if extension is None:
                    head += piece
                    extension = self._format_of(head) if len(head) >= SNIFF_BYTES else None
                digest.update(piece)
                file.write(piece)
            if inflater and received:
                inflater.finish()
            if not size:
                raise FetchError("empty")
            extension = extension or self._format_of(head)
            file.seek(0)
            return Body(file, size, digest.hexdigest(), extension)
        except BaseException:
            file.close()
            raise

    def _check_headers(self, response: aiohttp.ClientResponse) -> None:
        if response.status != 200:
            wait_s = retry_after_s(response.headers.get("Retry-After"))
            passes = response.status in _PASSES
            raise FetchError(f"http_{response.status}", again=passes, after_s=wait_s if passes else 0.0)
        content_type = response.headers.get("Content-Type", "").strip().lower()
        if content_type and not content_type.startswith(self._policy.content_types):
            raise FetchError("wrong_type", f"Content-Type {content_type[:60]}")
        length = response.content_length
        if length is not None and length > self._policy.max_bytes:
            raise FetchError("too_large", f"Content-Length {length}, limit {self._policy.max_bytes}")

    def _format_of(self, head: bytes) -> str:
        name = sniff(head)
        if name is None:
            raise FetchError("wrong_type", f"not the beginning of a picture: {head[:SNIFF_BYTES]!r}")
        if name not in self._policy.formats:
            raise FetchError("wrong_type", f"{name} is not in policy.formats")
        return name


@contextmanager
def _reasons() -> Generator[None]:
    """Give what aiohttp raises a reason; an exception that is not a server's doing goes through."""
    try:
        yield
    except (aiohttp.ClientError, TimeoutError, ConnectionError, ssl.SSLError) as error:
        cause = getattr(error, "os_error", error)
        if isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE):
            raise UserError(
                "too many open files; lower http.connections, or raise the limit with `ulimit -n`"
            ) from None
        raise _reason_of(error, cause) from error


def _reason_of(error: Exception, cause: object) -> FetchError:
    # In this order: the classes of aiohttp are each other's subclasses.
    if isinstance(cause, RefusedAddressError):
        return FetchError("refused_address", cause.address)
    if isinstance(error, TimeoutError):
        connecting = isinstance(error, aiohttp.ConnectionTimeoutError)
        reading = isinstance(error, aiohttp.SocketTimeoutError)
        which = "connect_timeout_s" if connecting else "read_timeout_s" if reading else "total_timeout_s"
        return FetchError("timeout", f"http.{which}", again=True)
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        again = getattr(cause, "errno", None) == -3  # EAI_AGAIN: the resolver failed, not the name
        return FetchError("dns_failed", str(getattr(cause, "strerror", cause))[:100], again=again)
    if isinstance(error, (aiohttp.ClientSSLError, ssl.SSLError)):
        return FetchError("tls_failed", str(cause)[:200])
    if isinstance(error, aiohttp.ClientConnectorError):
        return FetchError("connect_failed", str(getattr(cause, "strerror", None) or cause)[:200], again=True)
    if isinstance(error, aiohttp.ClientPayloadError):
        return FetchError("truncated", "the body stopped before its end", again=True)
    if isinstance(error, (aiohttp.ClientConnectionError, ConnectionError)):
        return FetchError("connection_lost", str(error)[:100], again=True)
    if isinstance(error, aiohttp.InvalidURL):
        return FetchError("bad_url", "refused by the HTTP library")
    return FetchError("bad_response", f"{type(error).__name__}: {getattr(error, 'message', '')}"[:200])


@asynccontextmanager
async def open_client(policy: Policy, http: HttpConfig, directory: Path) -> AsyncGenerator[Client]:
    """A client for the running event loop; large bodies wait in unnamed files in `directory`."""
    resolvers = ThreadPoolExecutor(min(http.connections, MAX_RESOLVERS), thread_name_prefix="resolve")
    asyncio.get_running_loop().set_default_executor(resolvers)
    keeping = _open_session(policy, http, keepalive_timeout=2)
    closing = _open_session(policy, http, force_close=True)
    closing.headers["Connection"] = "close"
    async with keeping, closing:
        yield Client(Sessions(keeping, closing), policy, http, directory)


def _open_session(policy: Policy, http: HttpConfig, **connections: Any) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(
        limit=0,  # our slots are the limit: time spent waiting for one is no time-out
        ttl_dns_cache=300,
        socket_factory=guarded_sockets(policy.allow_addresses),
        **connections,
    )
    timeout = aiohttp.ClientTimeout(
        total=http.total_timeout_s, connect=http.connect_timeout_s, sock_read=http.read_timeout_s
    )
    return aiohttp.ClientSession(
        connector=connector,
        timeout=timeout,
        headers={"User-Agent": http.user_agent, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"},
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        trust_env=False,
    )
