"""The config of `python -m preprocess fetch`; see configs/preprocess/fetch.toml."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from ipaddress import ip_network
from typing import Literal

from shared.config import require_at_least

# The formats that `responses.sniff` knows, by the extension that they are stored under.
Format = Literal["jpg", "png", "gif", "webp", "bmp", "tif", "avif", "heic", "jp2"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionsInput:
    """Tables with one picture per row: .parquet, or .csv, .tsv, .jsonl, each also .gz or .zst."""

    kind: Literal["captions"]
    paths: tuple[str, ...]
    url: str = "url"
    # Empty: the tars hold no .txt member.
    caption: str = "caption"
    # Column whose value names the sample; empty: the number of the row in all inputs.
    key: str = ""
    # Names of the columns of .csv and .tsv files that do not begin with them.
    columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require_paths(self.paths)
        if not self.url:
            raise ValueError("url is empty; name the column that holds the URLs")


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentsInput:
    """Interleaved documents, .parquet or .jsonl (also .gz, .zst): lists of texts and of image URLs."""

    kind: Literal["interleaved"]
    paths: tuple[str, ...]
    texts: str = "texts"
    images: str = "images"
    # As for captions; here it is only what failures are listed under.
    key: str = ""

    def __post_init__(self) -> None:
        _require_paths(self.paths)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatInput:
    """Conversations as the chat source reads them, .parquet, .arrow, .json or .jsonl (the last two also .gz, .zst)."""

    kind: Literal["chat"]
    paths: tuple[str, ...]
    # As for documents.
    key: str = ""

    def __post_init__(self) -> None:
        _require_paths(self.paths)


Input = CaptionsInput | DocumentsInput | ChatInput


def _require_paths(paths: tuple[str, ...]) -> None:
    if not paths:
        raise ValueError("paths is empty; name at least one file")


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What is stored, and what is not even asked for. A change makes all again."""

    # A body, as sent and after its Content-Encoding is undone. Larger ones are left at this size.
    max_bytes: int = 20 << 20
    formats: tuple[Format, ...] = ("jpg", "png", "gif", "webp", "bmp", "tif", "avif", "heic", "jp2")
    # Content types that are read at all, by their beginning; what a body is, is then seen in its first bytes.
    # Stores of objects give every file one of the last two; a missing type is read as well.
    content_types: tuple[str, ...] = ("image/", "application/octet-stream", "binary/octet-stream")
    # Directives of X-Robots-Tag that keep a picture out; empty ignores the header.
    opt_out: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    # The name that a directive for one user agent must carry to be for this one.
    user_agent_token: str = "parquetry"
    # Networks that are connected to although they are not public, such as "10.1.0.0/16".
    allow_addresses: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_at_least(self, 1, "max_bytes")
        if not self.formats:
            raise ValueError("formats is empty; name at least one, such as jpg")
        for network in self.allow_addresses:
            try:
                ip_network(network)
            except ValueError as error:
                raise ValueError(f"allow_addresses: {error}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpConfig:
    """How it is asked for. None of it changes what a fetched picture is."""

    # Say who is asking and where complaints go.
    user_agent: str = "Mozilla/5.0 (compatible; parquetry/0.1; fetches pictures for model training)"
    connections: int = 256
    connections_per_host: int = 4
    # From the first packet to the last of the handshake, the look-up of the name included.
    connect_timeout_s: float = 10.0
    # Between two pieces of a response.
    read_timeout_s: float = 15.0
    # One request, from its connection to the last byte.
    total_timeout_s: float = 60.0
    # Tries after the first one, of what may pass: no connection, time-outs, 408, 425, 429 and 5xx.
    retries: int = 2
    # Wait before the first of them; doubled for each one more, and up to half of it more or less by chance.
    backoff_s: float = 1.0
    # No wait is longer. A server that asks for more with Retry-After is not asked again.
    max_backoff_s: float = 60.0
    max_redirects: int = 5

    def __post_init__(self) -> None:
        require_at_least(self, 1, "connections", "connections_per_host")
        require_at_least(self, 0, "retries", "backoff_s", "max_backoff_s", "max_redirects")
        for name in ("connect_timeout_s", "read_timeout_s", "total_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchConfig:
    """A whole run. Relative paths are relative to the working directory."""

    # A directory of this machine, or a URI: s3://, gs://.
    output: str
    input: Input
    # One output file holds what came of so many rows of one input file; a stopped run loses at most two of them.
    rows_per_file: int = 2000
    # "3/16": only the third of sixteen slices of the output files; the others run elsewhere, into the same output.
    shard: str = "1/1"
    # The job stops when more than this share of the rows (or of the images of documents and conversations) failed. URLs
    # rot: 1.
    max_failure_rate: float = 1.0
    # When an earlier run in `output` had other settings or inputs: stop, or throw its work away.
    on_change: Literal["refuse", "rebuild"] = "refuse"
    policy: Policy = field(default_factory=Policy)
    http: HttpConfig = field(default_factory=HttpConfig)

    def __post_init__(self) -> None:
        if not self.output:
            raise ValueError("output is empty; name a directory")
        require_at_least(self, 1, "rows_per_file")
        if not 0 <= self.max_failure_rate <= 1:
            raise ValueError(f"max_failure_rate must lie in [0, 1], got {self.max_failure_rate}")
        slice_number, slices = self.slice
        if not 1 <= slice_number <= slices:
            raise ValueError(f'shard must be like "3/16", from 1/16 to 16/16, got {self.shard!r}')
        if slices > 1 and self.on_change == "rebuild":
            raise ValueError(
                "on_change = rebuild would remove the other slices' work; remove the output yourself"
            )

    @property
    def slice(self) -> tuple[int, int]:
        """(number, of how many), counted from 1; (0, 0) when `shard` cannot be read."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", self.shard)
        return (int(found[1]), int(found[2])) if found else (0, 0)
