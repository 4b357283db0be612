"""Objects in a store that a URI names (`s3://`, `gs://`, `hf://`, `https://`): few calls, each whole or an error.

Every call is tried again while its error may pass (time-outs, broken connections, status 5xx), with growing,
random pauses; then it is an OSError, which a job's executor answers by trying the whole unit again. What will not
pass (no such file or bucket, access refused, an unknown host) is a UserError that names the file. Messages show
no credentials: neither `user:password@` nor the signature in a query.

Credentials, regions and endpoints are those of the store's own client: its environment variables and files.
"""

from __future__ import annotations

import errno
import glob
import io
import os
import random
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from shared.errors import UserError
from shared.spans import RawSpan

R = TypeVar("R")

ATTEMPTS = 5
# Seconds before the second attempt; doubled each time, by a random half more or less. Some 4 s in all.
FIRST_PAUSE = 0.25
# One request per this much: large enough that 50 ms of latency cost little, small enough to be asked for again.
PART_BYTES = 16 << 20
# Parts of one file that are fetched at a time.
DOWNLOADS = 4

# Which extra of this project brings the client of a protocol.
_EXTRAS = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "hf": "hf",
    "http": "preprocess",
    "https": "preprocess",
}
# Object stores: what is written appears whole or not at all.
_WRITABLE = frozenset(("s3", "s3a", "gs", "gcs"))
_S3 = {
    "use_listings_cache": False,  # other processes write there too
    "config_kwargs": {"retries": {"max_attempts": 0}, "max_pool_connections": 64, "connect_timeout": 10},
}
_GCS = {"use_listings_cache": False}
_OPTIONS: dict[str, dict[str, Any]] = {"s3": _S3, "s3a": _S3, "gs": _GCS, "gcs": _GCS}
# Before gcsfs is imported: it asks another service for the kind of a bucket, again before every call and with a
# warning each time where that is not allowed. Only zonal buckets need it; "true" in the environment stays.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
# Arguments of reads by range: this client otherwise asks for 5 MiB at least.
_READ_OPTIONS = {"hf": {"cache_type": "none"}}
# Second names of protocols, and the first, by which their clients list objects.
_FIRST_NAMES = {"s3a": "s3", "gcs": "gs"}

# Names, so that no client has to be installed: errors of botocore, aiohttp, requests and httpx that may pass.
_PASSING_ERRORS = frozenset(
    "HTTPClientError ClientConnectionError ClientPayloadError IncompleteRead FSTimeoutError ResponseParserError "
    "TransportError ConnectionError Timeout".split()
)
_PASSING_STATUS = frozenset((408, 425, 429))
_PASSING_CODES = frozenset(("RequestTimeout", "IncompleteBody", "BadDigest", "SlowDown"))
_REFUSED_ERRORS = frozenset("NoCredentialsError PartialCredentialsError RefreshError GatedRepoError".split())


class StoreError(OSError):
    """A store that did not answer well in all attempts; it may later."""


@dataclass(frozen=True, slots=True)
class ObjectState:
    """Size in bytes, and what differs when the object was written again: an ETag, a version or a time."""

    size: int
    version: str


def is_remote(path: Path | str) -> bool:
    """Whether a path is a URI of a store; all others are paths of this machine."""
    return _protocol(str(path)) not in ("", "file", "local")


def as_path(text: str) -> Path:
    """A local path as `pathlib.Path`, a URI as `UPath`, which has the same methods though it is no subclass.

    s3a:// and gcs:// become s3:// and gs://, as listings have them: names are compared with those.

    Annotations say Path for both; what opens, renames or removes goes through `shared.files`.

    Raises:
        UserError: there is no client for stores of its kind.
    """
    if not is_remote(text):
        return Path(re.sub(r"^(file|local)://", "", text))
    from upath import UPath

    protocol = _protocol(text)
    uri = _FIRST_NAMES.get(protocol, protocol) + text[len(protocol) :].rstrip("/")
    if not re.match(r"[^:]+://[^/]", uri):  # with nothing behind it, it would be a path of this machine
        raise UserError(f"{shown(text)}: names no place in a store; expected {protocol}://BUCKET/PATH")
    _filesystem(uri)
    return cast(Path, UPath(uri, **_OPTIONS.get(_protocol(uri), {})))


def require_writable(path: Path) -> None:
    """Raises: UserError: what is written there would not appear whole or not at all."""
    if is_remote(path) and _protocol(str(path)) not in _WRITABLE:
        raise UserError(f"{shown(path)}: not a place for outputs; use a local path, s3:// or gs://")


def shown(uri: Path | str) -> str:
    """A URI for people: without user, password and signature."""
    text = re.sub(r"^(\w[\w+.-]*://)[^/@]*@", r"\1", str(uri))
    return without_query(text)


def without_query(path: str) -> str:
    """A path or URI whose end is the file's name: a signed URL has its signature behind that."""
    return path.partition("?")[0] if _protocol(path) in ("http", "https") else path


def state_of(uri: str) -> ObjectState:
    """What a store says of an object.

    Raises:
        UserError: it is not there, may not be read, or its server gives no parts of files.
    """

    def ask(filesystem: Any, path: str) -> ObjectState:
        if _protocol(uri) in ("http", "https"):
            return _http_state(filesystem, uri)
        found = filesystem.info(path)
        if found["type"] != "file":
            raise UserError(
                f"{shown(uri)}: a directory; name its files, for example {shown(uri).rstrip('/')}/*.tar"
            )
        names = ("ETag", "etag", "generation", "blob_id", "md5Hash", "LastModified", "mtime")
        version = next((str(found[name]) for name in names if found.get(name)), "")
        return ObjectState(int(found["size"]), version)

    return _attempt(uri, ask)


def find(pattern: str) -> list[str]:
    """URIs of the objects that a pattern matches, sorted."""
    if _protocol(pattern) in ("http", "https"):
        raise UserError(f"{shown(pattern)}: a web server has no list of its files; name each one")

    def search(filesystem: Any, path: str) -> list[str]:
        found: dict[str, Any] = filesystem.glob(path, detail=True)
        return sorted(
            filesystem.unstrip_protocol(name) for name, info in found.items() if info["type"] == "file"
        )

    return _attempt(pattern, search)


def read_range(uri: str, offset: int, size: int) -> bytes:
    """Bytes [offset, offset + size) of an object, fewer where it is shorter; one request per PART_BYTES."""
    parts = [
        _read_part(uri, start, min(PART_BYTES, offset + size - start))
        for start in range(offset, offset + size, PART_BYTES)
    ]
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _read_part(uri: str, offset: int, size: int) -> bytes:
    def read(filesystem: Any, path: str) -> bytes:
        if _protocol(uri) in ("http", "https"):
            return _http_range(filesystem, uri, offset, size)[0]
        try:
            options = _READ_OPTIONS.get(_protocol(uri), {})
            return filesystem.cat_file(path, start=offset, end=offset + size, **options)
        except Exception as error:
            if _status(error) == 416:  # begins behind the end
                return b""
            raise

    return _attempt(uri, read)


def download(uri: str, file: int) -> None:
    """Copy an object into an open file of this machine, some parts at a time.

    Raises:
        UserError: it changed meanwhile.
    """
    state = state_of(uri)

    def copy(offset: int) -> int:
        return os.pwrite(file, _read_part(uri, offset, PART_BYTES), offset)

    with ThreadPoolExecutor(DOWNLOADS) as pool:
        copied = sum(pool.map(copy, range(0, state.size, PART_BYTES)))
    if copied != state.size or state_of(uri) != state:
        raise UserError(f"{shown(uri)}: changed while it was read; run again when it is written no more")


def read_into(uri: str, view: memoryview, offset: int) -> int:
    """Fill `view` from byte `offset` on; how much there was."""
    data = read_range(uri, offset, len(view))
    view[: len(data)] = data
    return len(data)


def open_object(uri: str, buffer_bytes: int) -> BinaryIO:
    """An object as a file to read; one request per `buffer_bytes`, or per read of more than that."""
    raw = RawSpan(partial(read_into, uri), 0, state_of(uri).size, shown(uri))
    return io.BufferedReader(raw, buffer_bytes)


def read_bytes(uri: str) -> bytes | None:
    """A whole small object; None where there is none."""

    def read(filesystem: Any, path: str) -> bytes | None:
        try:
            return filesystem.cat_file(path)
        except FileNotFoundError:
            return None

    return _attempt(uri, read)


def size_of(uri: str) -> int | None:
    """Bytes of an object; None where there is none."""

    def ask(filesystem: Any, path: str) -> int | None:
        try:
            found = filesystem.info(path)
        except FileNotFoundError:
            return None
        return int(found["size"]) if found["type"] == "file" else None

    return _attempt(uri, ask)


def write_bytes(uri: str, data: bytes, *, create: bool = False) -> bool:
    """Write a small object; False if `create` and it is there already, in which case it is left alone."""

    def write(filesystem: Any, path: str) -> bool:
        try:
            filesystem.pipe_file(path, data, **({"mode": "create"} if create else {}))
        except FileExistsError:
            return False
        return True

    return _attempt(uri, write)


def write_file(local: Path, uri: str) -> None:
    """Copy a file to a store, where it appears when all of it has arrived."""
    _attempt(uri, lambda filesystem, path: filesystem.put_file(str(local), path))


def remove(uri: str) -> None:
    """Remove an object, which need not be there."""

    def erase(filesystem: Any, path: str) -> None:
        try:
            filesystem.rm_file(path)
        except FileNotFoundError:
            pass

    _attempt(uri, erase)


def remove_below(uri: str) -> None:
    """Remove all objects below a directory by URI, many per request; there need be none."""

    def erase(filesystem: Any, path: str) -> None:
        # The client takes some names for patterns, and with a bucket's name removes the bucket itself.
        if glob.has_magic(path) or "/" not in path:
            return
        try:
            filesystem.rm(path, recursive=True)
        except FileNotFoundError:
            pass

    _attempt(uri, erase)
    for left in list_below(uri):  # where the client keeps quiet about what was refused, this one tells
        remove(left)


def list_below(uri: str) -> dict[str, int]:
    """Sizes of all objects below a directory by URI; empty where there is none."""

    def search(filesystem: Any, path: str) -> dict[str, int]:
        try:
            found: dict[str, Any] = filesystem.find(path, detail=True)
        except FileNotFoundError:
            return {}
        return {filesystem.unstrip_protocol(name): int(info["size"]) for name, info in found.items()}

    return _attempt(uri, search)


def _protocol(text: str) -> str:
    found = re.match(r"([A-Za-z][\w+.-]+):/", text)
    return found[1].lower() if found else ""


def _filesystem(uri: str) -> tuple[Any, str]:
    """The client of a URI's store, one per process, and the path it calls the URI.

    Raises:
        UserError: the client is not installed, or nothing is known by this protocol.
    """
    from fsspec.core import url_to_fs

    protocol = _protocol(uri)
    try:
        return url_to_fs(uri, **_OPTIONS.get(protocol, {}))
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        mend = f"pip install 'parquetry[{extra}]'" if extra else f"install it ({_scrub(error)})"
        raise UserError(f"{shown(uri)}: the client of {protocol}:// is not installed; {mend}") from None
    except ValueError as error:
        raise UserError(f"{shown(uri)}: cannot be opened ({_scrub(error)}); correct the path") from None


def _attempt(uri: str, call: Callable[[Any, str], R]) -> R:
    """Call with client and path; again while its error may pass.

    Raises:
        UserError: the error will not pass.
        OSError: it did not pass in ATTEMPTS.
    """
    pause = FIRST_PAUSE
    for attempt in range(ATTEMPTS):
        try:
            return call(*_filesystem(uri))
        except UserError:
            raise
        except Exception as error:
            if mistake := _mistake(error, uri):
                raise UserError(f"{shown(uri)}: {mistake}") from None
            if not _may_pass(error):
                raise
            if attempt == ATTEMPTS - 1:
                if _unknown_host(error):
                    raise UserError(
                        f"{shown(uri)}: its host is not known here; correct it, or look at the network"
                    ) from None
                raise StoreError(errno.EIO, _scrub(error) or type(error).__name__, shown(uri)) from None
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause *= 2
    raise AssertionError("the last attempt returns or raises")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what led to it, nearest first."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__ or getattr(cause, "os_error", None)


def _names(error: BaseException) -> set[str]:
    return {cls.__name__ for cause in _causes(error) for cls in type(cause).__mro__}


def _status(error: BaseException) -> int:
    """The HTTP status that an error carries, 0 for none: aiohttp, gcsfs, botocore and requests differ."""
    for cause in _causes(error):
        if "HttpProcessingError" in {cls.__name__ for cls in type(cause).__mro__}:
            continue  # of aiohttp's parser: a body that broke off carries a 400 that nobody sent
        response: Any = getattr(cause, "response", None)
        status: Any = getattr(cause, "status", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        elif status is None:
            status = getattr(response, "status_code", None) or getattr(cause, "code", None)
        if isinstance(status, int) and 400 <= status < 600:
            return status
    return 0


def _mistake(error: BaseException, uri: str) -> str:
    """What a person has to mend, "" where it is not theirs."""
    status, names = _status(error), _names(error)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return "no such file or bucket; correct the path"
    if isinstance(error, PermissionError) or status in (401, 403) or names & _REFUSED_ERRORS:
        return f"access refused ({_scrub(error)}); look at the credentials for {_protocol(uri)}://"
    if any(
        isinstance(cause, socket.gaierror) and cause.errno != socket.EAI_AGAIN for cause in _causes(error)
    ):
        return "its host is not known; correct the path"
    if 400 <= status < 500 and status not in _PASSING_STATUS and not _passing_code(error):
        return f"the store answers with status {status} ({_scrub(error)}); correct the path"
    if "BotoCoreError" in names and not names & _PASSING_ERRORS:
        return f"cannot be used ({_scrub(error)}); correct the path or the settings of {_protocol(uri)}://"
    if isinstance(error, ValueError) and not _may_pass(error):  # what the client takes for no name of its own
        return f"cannot be opened ({_scrub(error)}); correct the path"
    return ""


def _may_pass(error: BaseException) -> bool:
    return (
        isinstance(error, (OSError, EOFError)) or _status(error) > 0 or bool(_names(error) & _PASSING_ERRORS)
    )


def _unknown_host(error: BaseException) -> bool:
    return any(isinstance(cause, socket.gaierror) for cause in _causes(error))


def _passing_code(error: BaseException) -> bool:
    responses = (getattr(cause, "response", None) for cause in _causes(error))
    codes = (response.get("Error", {}).get("Code") for response in responses if isinstance(response, dict))
    return any(code in _PASSING_CODES for code in codes)


def _scrub(error: BaseException) -> str:
    """An error's text in one line, without what a URL in it may keep secret."""
    text = re.sub(r"://[^\s/@]*@", "://", " ".join(str(error).split()))
    return re.sub(r"(https?://[^\s?'\"]*)\?[^\s'\")]*", r"\1", text)


def _no_ranges(uri: str) -> str:
    return f"{shown(uri)}: its server gives no parts of files; download it and name the copy"


def _http_state(filesystem: Any, url: str) -> ObjectState:
    """Asks for one byte: signed URLs may forbid HEAD, and a server that ignores ranges shows here."""
    _, headers = _http_range(filesystem, url, 0, 1)
    size = headers.get("Content-Range", "").rpartition("/")[2]
    if not size.isdecimal():
        raise UserError(_no_ranges(url))
    return ObjectState(int(size), headers.get("ETag") or headers.get("Last-Modified", ""))


def _http_range(filesystem: Any, url: str, offset: int, size: int) -> tuple[bytes, Mapping[str, str]]:
    """Body and headers of one part; the body is empty behind the end.

    Raises:
        UserError: the server gives no parts of files.
    """
    from fsspec.asyn import sync

    async def ask() -> tuple[bytes, Mapping[str, str]]:
        session = await filesystem.set_session()
        headers = {"Range": f"bytes={offset}-{offset + size - 1}", "Accept-Encoding": "identity"}
        async with session.get(filesystem.encode_url(url), headers=headers) as response:
            if response.status == 416:
                return b"", response.headers
            response.raise_for_status()
            if response.status != 206:
                raise UserError(_no_ranges(url))
            return await response.read(), response.headers

    return cast(Any, sync(filesystem.loop, ask))
