"""What of a response is believed: opt-out directives, redirects' targets, encodings, sizes, kinds of pictures.

Pure functions on headers and bytes; every refusal is a `FetchError` with its reason.
"""

from __future__ import annotations

import email.utils
import re
import time
import zlib
from collections.abc import Iterable

from yarl import URL

# Longer ones are data: URLs or damage, and no server takes them.
MAX_URL_CHARACTERS = 8192


class FetchError(Exception):
    """Why a URL gave nothing; `again` when another try may give something, `after_s` when the server said when."""

    def __init__(self, reason: str, detail: str = "", *, again: bool = False, after_s: float = 0.0) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail, self.again, self.after_s = reason, detail, again, after_s


def parse_url(text: str, base: URL | None = None) -> URL:
    """An http or https URL without credentials, its fragment taken off; relative to `base` if there is one.

    Raises:
        FetchError: it is none. The detail holds nothing of the URL: it may be a secret.
    """
    if len(text) > MAX_URL_CHARACTERS:
        raise FetchError("bad_url", f"{len(text)} characters, limit {MAX_URL_CHARACTERS}")
    try:
        url = URL(text.strip())
        url = base.join(url) if base is not None else url
        text.encode()
        # Each raises on what no look-up could take: labels that are empty or too long, ports that are no numbers.
        (url.raw_host or "").encode("idna")
        found = url.scheme, url.host, url.port
    except (ValueError, TypeError):
        raise FetchError("bad_url", "cannot be parsed") from None
    scheme, host, _ = found
    if scheme not in ("http", "https"):
        raise FetchError("bad_scheme", f"{scheme[:20] or 'none'}, expected http or https")
    if not host:
        raise FetchError("bad_url", "no host")
    if url.user is not None or url.password is not None:
        raise FetchError("url_with_credentials", "user or password in the URL")
    return url.with_fragment(None)


def redacted(url: str) -> str:
    """The URL without user and password, also where it is too broken to be parsed."""
    try:
        readable = bool(URL(url).host)
    except ValueError:
        readable = False
    # Up to the last @ of the host's part; of something unreadable, up to the last @ of all.
    pattern = r"^([^/?#]*//)?[^/?#]*@" if readable else r"(?s)^([^/?#]*//)?.*@"
    return re.sub(pattern, lambda found: f"{found[1] or ''}***@", url)


# Directives of X-Robots-Tag whose own value follows a colon; any other word before a colon is a user agent.
_WITH_VALUE = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")


def opt_out_of(headers: Iterable[str], directives: Iterable[str], user_agent_token: str) -> str | None:
    """The first directive in X-Robots-Tag headers that says no to us; None when none does.

    `noai, noindex` is for all, `someone: noai, noindex` for that user agent, up to the next one named.
    """
    unwanted, token = {word.lower() for word in directives}, user_agent_token.lower()
    for header in headers:
        for_us = True
        for item in header.lower().split(","):
            name, colon, rest = item.partition(":")
            if colon and name.strip() not in _WITH_VALUE:
                for_us, item = name.strip() in ("*", token), rest
            if for_us and item.strip() in unwanted:
                return item.strip()
    return None


def retry_after_s(header: str | None) -> float:
    """Seconds that a Retry-After header asks for, as a number or a date; 0 when it says nothing sensible."""
    if header is None:
        return 0.0
    if re.fullmatch(r"\d{1,9}", header.strip()):
        return float(header)
    try:
        when = email.utils.parsedate_to_datetime(header).timestamp()
    except (ValueError, OverflowError):
        return 0.0
    return max(0.0, when - time.time())


class Inflater:
    """Undoes gzip or deflate piece by piece and never makes more than `limit` bytes, whatever it is fed."""

    def __init__(self, encoding: str, limit: int) -> None:
        # 32: gzip or zlib, by its first bytes.
        self._stream = zlib.decompressobj(wbits=32 + zlib.MAX_WBITS)
        self._encoding, self._room, self._begun = encoding, limit, False

    def feed(self, piece: bytes) -> bytes:
        """Raises: FetchError: `too_large`, or `bad_encoding` for what no such stream holds."""
        if not self._begun and piece:
            self._begun = True
            if self._encoding == "deflate" and piece[0] & 0x0F != 8:  # some send it without its wrapper
                self._stream = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
        try:
            made = self._stream.decompress(piece, self._room + 1)
        except zlib.error as error:
            raise FetchError("bad_encoding", f"{self._encoding}: {error}") from None
        if self._stream.unused_data:
            raise FetchError("bad_encoding", f"{self._encoding}: bytes behind its end")
        self._room -= len(made)
        if self._room < 0:
            raise FetchError("too_large", f"{self._encoding} that unpacks beyond the limit")
        return made

    def finish(self) -> None:
        """Raises: FetchError: the stream did not come to its end."""
        if not self._stream.eof:
            raise FetchError("truncated", f"{self._encoding} without its end", again=True)


def open_inflater(encoding: str, limit: int) -> Inflater | None:
    """What undoes a Content-Encoding; None when there is nothing to undo.

    Raises:
        FetchError: an encoding, or a chain of them, that was not asked for.
    """
    name = encoding.strip().lower()
    if name in ("", "identity", "none"):
        return None
    if name not in ("gzip", "x-gzip", "deflate"):
        raise FetchError("unsupported_encoding", name[:40])
    return Inflater(name, limit)


SNIFF_BYTES = 16
_HEAD = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"GIF87a": "gif",
    b"GIF89a": "gif",
    b"BM": "bmp",
    b"II*\0": "tif",
    b"MM\0*": "tif",
    b"\0\0\0\x0cjP  \r\n\x87\n": "jp2",
    b"\xff\x4f\xff\x51": "jp2",
}
_BRAND = {
    b"avif": "avif",
    b"avis": "avif",
    b"heic": "heic",
    b"heix": "heic",
    b"mif1": "heic",
    b"msf1": "heic",
}


def sniff(head: bytes) -> str | None:
    """The extension of the picture format that a body's first `SNIFF_BYTES` bytes belong to; None for no picture."""
    for magic, name in _HEAD.items():
        if head.startswith(magic):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    return _BRAND.get(head[8:12]) if head[4:8] == b"ftyp" else None
