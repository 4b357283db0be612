"""What became of a chunk: counts that balance, and every failure with its key, place and reason.

rows      read = fetched + failed(by reason)       of documents, conversations: "written", with or without pictures
images    read = fetched + failed(by reason)       of these only: the URLs of pictures in them
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from preprocess.fetch.responses import redacted

FAILURE_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),  # over all input files
        pa.field("position", pa.int32()),  # of the image in its document; null for what concerns a row
        pa.field("url", pa.string(), nullable=False),  # without user and password
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)


@dataclass(slots=True)
class Account:
    """One equation: read = fetched + failed."""

    read: int = 0
    fetched: int = 0
    failed: Counter[str] = field(default_factory=Counter[str])

    def add(self, other: Account) -> None:
        self.read += other.read
        self.fetched += other.fetched
        self.failed.update(other.failed)

    def as_dict(self) -> dict[str, Any]:
        return {"read": self.read, "fetched": self.fetched, "failed": dict(sorted(self.failed.items()))}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Account:
        return cls(found["read"], found["fetched"], Counter(found["failed"]))


@dataclass(slots=True)
class Result:
    """Of one chunk, or the sum of several."""

    rows: Account = field(default_factory=Account)
    images: Account = field(default_factory=Account)
    image_bytes: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def fail_row(self, key: str, row: int, url: str, reason: str, detail: str) -> None:
        self.rows.failed[reason] += 1
        self._list(key, row, None, url, reason, detail)

    def fail_image(self, key: str, row: int, position: int, url: str, reason: str, detail: str) -> None:
        self.images.failed[reason] += 1
        self._list(key, row, position, url, reason, detail)

    def _list(self, key: str, row: int, position: int | None, url: str, reason: str, detail: str) -> None:
        values = (key, row, position, redacted(url), reason, detail)
        self.failures.append(dict(zip(FAILURE_SCHEMA.names, values, strict=True)))

    def add(self, other: Result) -> None:
        """Counts only: failures stay in the files of their chunks."""
        self.rows.add(other.rows)
        self.images.add(other.images)
        self.image_bytes += other.image_bytes

    def check(self) -> None:
        """Raises: RuntimeError: a row or an image was lost; the counts come from different places."""
        for name, account in (("rows", self.rows), ("images", self.images)):
            if account.read != account.fetched + account.failed.total():
                raise RuntimeError(
                    f"{name}: read {account.read} != fetched {account.fetched} + failed {dict(account.failed)}"
                )

    def as_dict(self) -> dict[str, Any]:
        counts = {"rows": self.rows.as_dict(), "image_bytes": self.image_bytes}
        return {**counts, "images": self.images.as_dict()} if self.images.read else counts

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Result:
        images = found.get("images", Account().as_dict())
        return cls(Account.from_dict(found["rows"]), Account.from_dict(images), found["image_bytes"])


def write_failures(path: Path, failures: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(failures, schema=FAILURE_SCHEMA)
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)
