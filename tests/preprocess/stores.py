"""Stores on loopback: servers of S3, GCS, the Hub and the web, and a proxy that breaks connections."""

from __future__ import annotations

import hashlib
import http.server
import json
import logging
import os
import re
import socket
import socketserver
import struct
import sys
import threading
import urllib.parse
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

BUCKET = "bucket"


@contextmanager
def s3_server() -> Generator[str, None, None]:
    """The address of an S3 server with one empty bucket; the environment's credentials are for it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    patch = pytest.MonkeyPatch()
    try:
        use_s3(patch, f"http://{host}:{port}")
        client().create_bucket(Bucket=BUCKET)
        yield f"http://{host}:{port}"
    finally:
        patch.undo()
        server.stop()


def use_s3(patch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Let clients that are made from here on talk to `endpoint`."""
    from s3fs import S3FileSystem

    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        patch.setenv(name, value)
    S3FileSystem.clear_instance_cache()


def client() -> Any:
    import boto3

    return boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])


def put(key: str, data: bytes) -> str:
    """Put an object; its URI."""
    client().put_object(Bucket=BUCKET, Key=key, Body=data)
    return f"s3://{BUCKET}/{key}"


@contextmanager
def gs_server() -> Generator[str, None, None]:
    """The address of a GCS server with one empty bucket; clients that are made from here on talk to it."""
    from gcp_storage_emulator.handlers import objects
    from gcp_storage_emulator.server import create_server

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    patch = pytest.MonkeyPatch()
    upload = objects._multipart_upload

    def upload_if_absent(request: Any, response: Any, storage: Any) -> None:
        """What the emulator lacks: GCS refuses to make an object anew where that is asked for."""
        there = storage.objects.get(request.params["bucket_name"], {})
        if request.query.get("ifGenerationMatch") == ["0"] and request.data["meta"]["name"] in there:
            response.status = http.HTTPStatus.PRECONDITION_FAILED
            return
        upload(request, response, storage)

    patch.setattr(objects, "_multipart_upload", upload_if_absent)
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)  # it reports what is not there
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
    server.start()
    try:
        use_gs(patch, f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
    finally:
        patch.undo()
        server.stop()


def use_gs(patch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Let GCS clients that are made from here on talk to `endpoint`, without credentials."""
    patch.setenv("STORAGE_EMULATOR_HOST", endpoint)
    # Read when the client is imported, which otherwise looks for a machine of that cloud around it.
    patch.setenv("NO_GCE_CHECK", "true")
    import gcsfs

    gcsfs.GCSFileSystem.clear_instance_cache()


def without_gs(patch: pytest.MonkeyPatch) -> None:
    """As if the client of GCS were not installed: fsspec keeps the class that it found once."""
    from fsspec.registry import _registry as found

    patch.setitem(sys.modules, "gcsfs", None)
    for name in ("gs", "gcs"):
        patch.delitem(found, name, raising=False)


class Proxy(socketserver.ThreadingTCPServer):
    """Passes bytes on to a server, and resets connections when `budget` of bytes from the server is used up.

    budget: bytes that still pass; None for all. refill: the budget after a reset; 0 leaves it used up. resets: how
    many connections are broken before all passes again; None for no end.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Pipe)
        host, _, port = target.rpartition("://")[2].partition(":")
        self.target = (host, int(port))
        self.budget: int | None = None
        self.refill = 0
        self.resets: int | None = None
        self.broken = 0
        self.requests = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def breaks(self, size: int) -> bool:
        """Whether the connection that brings `size` bytes more is broken."""
        if self.budget is None or self.resets == 0:
            return False
        self.budget -= size
        if self.budget > 0:
            return False
        self.broken += 1
        self.budget = self.refill
        if self.resets is not None:
            self.resets -= 1
        return True


class _Pipe(socketserver.BaseRequestHandler):
    server: Proxy

    def handle(self) -> None:
        with socket.create_connection(self.server.target) as upstream:
            back = threading.Thread(target=self._back, args=(upstream,), daemon=True)
            back.start()
            try:
                while data := self.request.recv(1 << 16):
                    self.server.requests += len(re.findall(rb"\b(?:GET|PUT|HEAD|POST|DELETE) /", data))
                    upstream.sendall(data)
                upstream.shutdown(socket.SHUT_WR)
            except OSError:
                pass
            back.join()

    def _back(self, upstream: socket.socket) -> None:
        try:
            while data := upstream.recv(1 << 14):
                if self.server.breaks(len(data)):
                    # Closing without patience sends a reset, once nobody waits for bytes of it any more.
                    self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.request.shutdown(socket.SHUT_RD)
                    self.request.close()
                    return
                self.request.sendall(data)
            self.request.shutdown(socket.SHUT_WR)
        except OSError:
            pass


@contextmanager
def proxy_to(target: str) -> Generator[Proxy, None, None]:
    with Proxy(target) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True, kwargs={"poll_interval": 0.05}).start()
        yield proxy
        proxy.shutdown()


class _Files(http.server.SimpleHTTPRequestHandler):
    """Files of a directory; `ranges` says whether parts are given, `failures` how many requests fail before."""

    def __init__(self, *arguments: Any, web: WebServer, **options: Any) -> None:
        self._web = web
        super().__init__(*arguments, directory=str(web.directory), **options)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        if not self._fails():
            super().do_HEAD()

    def _fails(self) -> bool:
        self._web.paths.append(self.path)
        if not self._web.failures:
            return False
        self._web.failures -= 1
        self.send_response(self._web.status)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return True

    def do_GET(self) -> None:
        if self._fails():
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if not (wanted and self._web.ranges and path.is_file()):
            super().do_GET()
            return
        data = path.read_bytes()
        begin, end = int(wanted[1]), min(int(wanted[2]) + 1, len(data))
        if begin >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        self.send_header("Content-Length", str(end - begin))
        self.send_header("ETag", f'"{hash(data):x}"')
        self.end_headers()
        self.wfile.write(data[begin:end])


class _Hub(http.server.BaseHTTPRequestHandler):
    """One data set of the Hub, x/y, whose files are those of a directory: what HfFileSystem asks for, to read."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *arguments: Any, hub: Hub, **options: Any) -> None:
        self._hub = hub
        super().__init__(*arguments, **options)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if re.fullmatch(r"/api/datasets/x/y(/revision/main)?", path):
            self._json({"id": "x/y", "sha": "0" * 40})
        elif found := re.fullmatch(r"/api/datasets/x/y/tree/main/?(.*)", path):
            self._tree(self._hub.directory / found[1])
        elif found := re.fullmatch(r"/datasets/x/y/resolve/main/(.+)", path):
            self._file(self._hub.directory / found[1])
        else:
            self._absent("RepoNotFound")

    def _tree(self, directory: Path) -> None:
        if not directory.is_dir():
            self._absent("EntryNotFound")
            return
        entries = directory.rglob("*") if "recursive=true" in self.path.lower() else directory.iterdir()
        self._json([self._entry(path) for path in sorted(entries)])

    def _entry(self, path: Path) -> dict[str, Any]:
        data = b"" if path.is_dir() else path.read_bytes()
        return {
            "type": "directory" if path.is_dir() else "file",
            "path": str(path.relative_to(self._hub.directory)),
            "size": len(data),
            "oid": hashlib.sha1(data).hexdigest(),
        }

    def _file(self, path: Path) -> None:
        if not path.is_file():
            self._absent("EntryNotFound")
            return
        data, wanted = path.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted:
            data = data[int(wanted[1]) : int(wanted[2]) + 1]
        self._hub.sent.append(len(data))
        self._answer(206 if wanted else 200, data)

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _absent(self, code: str) -> None:
        self._answer(404, b"", {"X-Error-Code": code})

    def _answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


class Hub:
    """A directory as the data set hf://datasets/x/y; `sent` are the bytes of every answer to a read of a file."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sent: list[int] = []
        self.address = ""


@contextmanager
def hub_server(directory: Path) -> Generator[Hub, None, None]:
    hub = Hub(directory)
    with _Server(("127.0.0.1", 0), partial(_Hub, hub=hub)) as server:
        hub.address = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.05}).start()
        yield hub
        server.shutdown()


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that went away is no news


class WebServer:
    """A directory on the web."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ranges = True
        self.failures, self.status = 0, 503
        self.paths: list[str] = []
        self.address = ""


@contextmanager
def web_server(directory: Path) -> Generator[WebServer, None, None]:
    web = WebServer(directory)
    with _Server(("127.0.0.1", 0), partial(_Files, web=web)) as server:
        web.address = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.05}).start()
        yield web
        server.shutdown()
