"""One URL against servers that misbehave: what comes back is the picture or the reason, in bounded time and bytes."""

from __future__ import annotations

import asyncio
import email.utils
import hashlib
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from preprocess.fetch.client import Body, Client, Failure, open_client
from preprocess.fetch.config import HttpConfig, Policy
from tests.preprocess.fetch.server import PICTURE, Server, serving

LOOPBACK = ("127.0.0.0/8", "::1/128")
QUICK = {
    "connect_timeout_s": 2.0,
    "read_timeout_s": 0.3,
    "total_timeout_s": 1.0,
    "retries": 2,
    "backoff_s": 0.01,
    "max_backoff_s": 2.0,
    "max_redirects": 3,
}

on_disk: list[bool] = []  # of the bodies of the last `fetch`


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


def fetch(directory: Path, *urls: str, policy: dict[str, Any] | None = None, **http: Any) -> dict[str, Any]:
    """By URL: the bytes, or the failure."""
    on_disk.clear()
    found: dict[str, Any] = {}

    def store(url: str, outcome: Body | Failure) -> None:
        if isinstance(outcome, Body):
            data = outcome.file.read()
            on_disk.append(outcome.file._rolled)  # type: ignore[attr-defined]
            assert len(data) == outcome.size and hashlib.sha256(data).hexdigest() == outcome.sha256
            found[url] = (data, outcome.extension)
        else:
            found[url] = outcome

    async def run() -> None:
        options = {"allow_addresses": LOOPBACK, "max_bytes": 1 << 20, **(policy or {})}
        async with open_client(Policy(**options), HttpConfig(**{**QUICK, **http}), directory) as client:
            assert isinstance(client, Client)
            await client.fetch_each(urls, store)

    asyncio.run(run())
    assert not list(directory.iterdir())  # bodies on disk have no name
    return found


def reason(directory: Path, url: str, **options: Any) -> tuple[str, str]:
    outcome = fetch(directory, url, **options)[url]
    assert isinstance(outcome, Failure), outcome
    return outcome.reason, outcome.detail


@pytest.mark.parametrize(
    "path",
    [
        "/ok/1",
        "/chunked/1",
        "/no-length/1",
        "/typed/1?type=",
        "/typed/1?type=application/octet-stream",
        "/typed/1?type=IMAGE/whatever",
        "/encoded/1?how=gzip&name=gzip",
        "/encoded/1?how=plain&name=identity",
        "/slow/1?s=0.1",
    ],
)
def test_a_picture_comes_back_as_it_was_sent(server: Server, tmp_path: Path, path: str) -> None:
    url = server.url(path)
    assert fetch(tmp_path, url) == {url: (PICTURE, "png")}


@pytest.mark.parametrize(
    ("path", "expected", "detail"),
    [
        ("/status/1?code=404", "http_404", ""),
        ("/status/2?code=204", "http_204", ""),
        ("/status/3?code=206", "http_206", ""),
        ("/status/4?code=304", "http_304", ""),
        ("/status/5?code=302", "http_302", ""),  # a redirect to nowhere
        ("/empty/1", "empty", ""),
        ("/typed/2?type=text/html", "wrong_type", "Content-Type text/html"),
        ("/typed/3?type=image/png&body=html", "wrong_type", "b'html'"),
        ("/typed/4?type=&body=" + "x" * 99, "wrong_type", "not the beginning of a picture"),
        ("/claims/1", "too_large", "Content-Length 99999999999, limit 1048576"),
        ("/endless/1", "too_large", "more than 1048576 bytes"),
        ("/encoded/2?how=bomb&name=gzip", "too_large", "unpacks beyond the limit"),
        ("/encoded/3?how=plain&name=gzip", "bad_encoding", "gzip"),
        ("/encoded/4?how=plain&name=br", "unsupported_encoding", "br"),
        ("/encoded/5?how=gzip&name=gzip,%20gzip", "unsupported_encoding", "gzip, gzip"),
        ("/bad-chunk/1", "bad_response", ""),
        ("/loop/1", "too_many_redirects", "more than 3"),
        ("/robots/1?tag=noai", "robots_opt_out", "X-Robots-Tag: noai"),
    ],
)
def test_what_will_not_change_is_asked_once_and_has_its_reason(
    server: Server, tmp_path: Path, path: str, expected: str, detail: str
) -> None:
    found = reason(tmp_path, server.url(path))
    assert found[0] == expected and detail in found[1]
    assert server.requests[path] == (4 if path == "/loop/1" else 1)  # max_redirects 3: four requests


@pytest.mark.parametrize(
    ("path", "expected", "detail"),
    [
        ("/silent/1", "timeout", "http.read_timeout_s; 3 tries"),
        ("/drip/1", "timeout", "http.total_timeout_s; 3 tries"),
        ("/cut/1", "truncated", "3 tries"),
        ("/cut-chunked/1", "truncated", "3 tries"),
        ("/encoded/6?how=cut&name=gzip", "truncated", "gzip without its end; 3 tries"),
        ("/status/6?code=503", "http_503", "3 tries"),
        ("/reset/1", "connection_lost", "3 tries"),
        ("/reset-later/1", "truncated", "3 tries"),
    ],
)
def test_what_may_pass_is_tried_again_and_then_has_its_reason(
    server: Server, tmp_path: Path, path: str, expected: str, detail: str
) -> None:
    found = reason(tmp_path, server.url(path), total_timeout_s=0.5)
    assert found[0] == expected and found[1].endswith(detail)
    # aiohttp itself asks once more where a connection ended before the response began.
    assert server.requests[path] == (6 if expected == "connection_lost" else 3)


def test_an_endless_body_is_left_at_the_limit(server: Server, tmp_path: Path) -> None:
    before = server.sent_bytes
    assert reason(tmp_path, server.url("/endless/2"))[0] == "too_large"
    assert server.sent_bytes - before < 16 << 20  # 1 MiB, and what the sockets' buffers swallow


def test_a_server_that_fails_twice_is_asked_a_third_time(server: Server, tmp_path: Path) -> None:
    url = server.url("/fails-first/1?code=500&times=2")
    assert fetch(tmp_path, url) == {url: (PICTURE, "png")}
    assert reason(tmp_path, server.url("/fails-first/2?code=500&times=2"), retries=1) == (
        "http_500",
        "2 tries",
    )


def test_retry_after_is_waited_for(server: Server, tmp_path: Path) -> None:
    url, begin = server.url("/fails-first/3?code=429&times=1&after=1"), time.monotonic()
    assert fetch(tmp_path, url) == {url: (PICTURE, "png")}
    assert time.monotonic() - begin >= 1


def test_retry_after_as_a_date_is_waited_for(server: Server, tmp_path: Path) -> None:
    when = time.time() + 2  # dates have whole seconds: at least one
    date = quote(email.utils.formatdate(when, usegmt=True))
    url, begin = server.url(f"/fails-first/4?code=503&times=1&after={date}"), time.time()
    assert fetch(tmp_path, url) == {url: (PICTURE, "png")}
    assert time.time() >= int(when) > begin


def test_a_server_that_asks_for_more_than_the_longest_wait_is_not_asked_again(
    server: Server, tmp_path: Path
) -> None:
    path, begin = "/fails-first/5?code=429&times=1&after=86400", time.monotonic()
    assert reason(tmp_path, server.url(path)) == ("http_429", "")
    assert server.requests[path] == 1 and time.monotonic() - begin < 1


def test_the_whole_host_rests_after_retry_after(server: Server, tmp_path: Path) -> None:
    busy = "/fails-first/6?code=429&times=1&after=1"
    others = [f"/ok/rest-{number}" for number in range(3)]
    found = fetch(tmp_path, *map(server.url, [busy, *others]), connections_per_host=1)
    assert all(outcome == (PICTURE, "png") for outcome in found.values())
    # They waited in line behind the one that was told to come back in a second.
    assert min(server.times[path] for path in others) - server.times[busy] >= 1


def test_requests_at_one_time_are_bounded_per_host_and_in_all(tmp_path: Path) -> None:
    with serving() as server:
        urls = [server.url(f"/slow/{number}?s=0.05") for number in range(24)]
        assert len(fetch(tmp_path, *urls, connections_per_host=3)) == 24
        assert server.open_most == 3
    with serving() as server:
        urls = [server.url(f"/slow/{number}?s=0.05") for number in range(12)]
        assert len(fetch(tmp_path, *urls, connections=2, connections_per_host=8)) == 12
        assert server.open_most == 2


def test_a_connection_is_kept_only_while_others_wait_for_its_host(tmp_path: Path) -> None:
    for obeys in (True, False):
        with serving() as server:
            server.obeys = obeys
            urls = [server.url(f"/ok/{number}") for number in range(4)]
            fetch(tmp_path, *urls, connections=1, connections_per_host=4)  # nobody waits for the host
            assert server.connections == 4
    with serving() as server:
        urls = [server.url(f"/ok/{number}") for number in range(9)]
        fetch(tmp_path, *urls, connections=1, connections_per_host=1)
        assert server.connections == 3  # the first begins alone, the last ends alone, the others share one


def test_waiting_for_a_place_is_no_time_out(server: Server, tmp_path: Path) -> None:
    urls = [server.url(f"/slow/place-{number}?s=0.1") for number in range(8)]  # 0.8 s, one after another
    found = fetch(tmp_path, *urls, connections_per_host=1, total_timeout_s=0.4, connect_timeout_s=0.4)
    assert all(outcome == (PICTURE, "png") for outcome in found.values())


@pytest.mark.parametrize(
    "location", ["/ok/redirected", "{base}/ok/redirected", "//127.0.0.1:{port}/ok/redirected"]
)
def test_a_redirect_is_followed(server: Server, tmp_path: Path, location: str) -> None:
    target = location.format(base=server.url(""), port=server.port)
    url = server.url(f"/to/1?url={quote(target, safe='')}")
    assert fetch(tmp_path, url) == {url: (PICTURE, "png")}


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("file:///etc/passwd", "bad_scheme"),
        ("ftp://127.0.0.1/x", "bad_scheme"),
        ("data:image/png;base64,AAAA", "bad_scheme"),
        ("http://169.254.169.254/latest/meta-data/", "refused_address"),
        ("http://10.0.0.1/", "refused_address"),
        ("http://[::ffff:10.0.0.1]/", "refused_address"),
        ("http://[fe80::1]/", "refused_address"),
        ("http://user:secret@127.0.0.1/", "url_with_credentials"),
        ("http://[half", "bad_url"),
    ],
)
def test_a_redirect_is_checked_like_the_first_url(
    server: Server, tmp_path: Path, target: str, expected: str
) -> None:
    found = reason(tmp_path, server.url(f"/to/2?url={quote(target, safe='')}"))
    assert found[0] == expected and "secret" not in found[1]


REFUSED = [
    "127.0.0.1",
    "localhost",
    "0x7f000001",
    "[::1]",
    "[::1%25lo]",
    "\u2460\u2461\u2466.0.0.1",
]  # circled 127


@pytest.mark.parametrize("host", [*REFUSED, "LOCALHOST.", "2130706433", "127.1", "0"])
def test_no_spelling_of_loopback_gets_a_connection_that_is_not_allowed(
    server: Server, tmp_path: Path, host: str
) -> None:
    before = server.requests.total()
    found = reason(tmp_path, server.url("/ok/secret", host), policy={"allow_addresses": ()})
    assert found[0] in ("refused_address", "bad_url", "dns_failed"), found
    if host in REFUSED:
        assert found[0] == "refused_address"
    assert server.requests.total() == before


def test_the_address_is_judged_when_it_is_connected_to_not_when_it_is_looked_up(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A name that is public at its first look-up and loopback ever after, as a rebinding attack has it.
    answers = iter(["93.184.216.34"])
    genuine = socket.getaddrinfo

    def rebound(host: str, port: int, *rest: Any, **options: Any) -> Any:
        if host == "rebind.test":
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers, "127.0.0.1"), port))]
        return genuine(host, port, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", rebound)
    assert socket.getaddrinfo("rebind.test", 80)[0][4][0] == "93.184.216.34"  # what a check before would see
    before = server.requests.total()
    found = reason(tmp_path, server.url("/ok/1", "rebind.test"), policy={"allow_addresses": ()})
    assert found == ("refused_address", "127.0.0.1") and server.requests.total() == before


def test_a_name_that_does_not_exist_is_dns_failed(tmp_path: Path) -> None:
    assert reason(tmp_path, "http://no-such-host.invalid/x.jpg", retries=0)[0] == "dns_failed"


def test_a_port_that_nobody_listens_at_is_connect_failed(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert reason(tmp_path, f"http://127.0.0.1:{port}/x.jpg")[0] == "connect_failed"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_certificate_that_nobody_vouches_for_is_tls_failed(tmp_path: Path) -> None:
    own, place = tmp_path / "own.pem", ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    subprocess.run([*make, *place, "-keyout", own, "-out", own], check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(own)
    own.unlink()
    with serving(tls) as server:
        found = reason(tmp_path, server.url("/ok/1").replace("http:", "https:"))
        assert found[0] == "tls_failed" and "self-signed" in found[1] and not server.requests


def test_a_server_that_answers_no_handshake_is_a_timeout_while_connecting(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}/x.jpg"
        found = reason(tmp_path, url, retries=0, connect_timeout_s=0.2)
    assert found == ("timeout", "http.connect_timeout_s")


def test_a_server_that_speaks_no_tls_is_tls_failed(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        port = listener.getsockname()[1]
        assert reason(tmp_path, f"https://127.0.0.1:{port}/x.jpg", retries=0)[0] == "tls_failed"
        thread.join(10)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("", "bad_scheme"),
        ("picture.jpg", "bad_scheme"),
        ("file:///etc/passwd", "bad_scheme"),
        ("http://", "bad_url"),
        ("http:///x", "bad_url"),
        ("http://host:port/", "bad_url"),
        ("http://a..b/", "bad_url"),
        ("http://.a/", "bad_url"),
        ("http://xn--/", "bad_url"),
        ("http://" + "a" * 64 + ".com/", "bad_url"),
        ("http://127.0.0.1\\@10.0.0.1/", "bad_url"),
        ("http://host:99999/", "bad_url"),
        ("http://\ud800/", "bad_url"),
        ("http://h/" + "x" * 9000, "bad_url"),
        ("http://user@127.0.0.1/", "url_with_credentials"),
        ("http://:@127.0.0.1/", "url_with_credentials"),
    ],
)
def test_what_is_no_url_to_fetch_is_not_asked_for(tmp_path: Path, url: str, expected: str) -> None:
    assert reason(tmp_path, url)[0] == expected


def test_opt_out_is_a_setting_and_a_directive_for_another_agent_is_not_for_us(
    server: Server, tmp_path: Path
) -> None:
    url = server.url("/robots/2?tag=otherbot:%20noai|parquetry:%20noimageai")
    assert reason(tmp_path, url) == ("robots_opt_out", "X-Robots-Tag: noimageai")
    assert fetch(tmp_path, url, policy={"user_agent_token": "thirdbot"})[url] == (PICTURE, "png")
    assert fetch(tmp_path, url, policy={"opt_out": ()})[url] == (PICTURE, "png")


def test_a_format_that_is_not_wanted_is_a_wrong_type(server: Server, tmp_path: Path) -> None:
    found = reason(tmp_path, server.url("/ok/1"), policy={"formats": ("jpg",)})
    assert found == ("wrong_type", "png is not in policy.formats")


def test_a_body_larger_than_memory_holds_waits_on_disk(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.url("/ok/1")
    for limit, expected in ((len(PICTURE), False), (len(PICTURE) - 1, True)):
        monkeypatch.setattr("preprocess.fetch.client.IN_MEMORY_BYTES", limit)
        assert fetch(tmp_path, url) == {url: (PICTURE, "png")}
        assert on_disk == [expected]


def test_a_request_says_who_asks_and_carries_no_cookie(tmp_path: Path) -> None:
    with serving() as server:
        fetch(tmp_path, server.url("/ok/1"), user_agent="tester/1 (+mailto:x@example.org)")
        (head,) = server.headers
    assert "User-Agent: tester/1 (+mailto:x@example.org)\r\n" in head
    assert "Accept-Encoding: identity\r\n" in head and "cookie" not in head.lower()
