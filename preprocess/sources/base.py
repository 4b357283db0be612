"""What every input format has in common: the settings of a source and the protocol of its reader."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from preprocess.samples import RawSample, Reject
from shared.errors import UserError
from shared.remote import shown
from shared.tokens import TokenNames


class BadFileError(UserError):
    """A raw file of which nothing can be read; `reason` is counted where `bad_file` has it rejected."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadFileError], tuple[str, str]]:
        return BadFileError, (self.reason, str(self))  # from worker to job


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One named table under [sources]: where samples come from and what happens to the odd ones."""

    # Files, patterns of files, or URIs of both: s3://, gs://, hf://; https:// for single files.
    paths: tuple[str, ...]
    # What happens to a sample that does not fit one pack: cut at token borders, or rejected by name of budget.
    too_long: Literal["split", "reject"] = "reject"
    # What a picture costs that cannot be used: its whole sample, or itself and its place in the text.
    bad_media: Literal["reject", "drop"] = "reject"
    # A raw file that cannot be read at all stops the job, or is one reject, NAME#file.
    bad_file: Literal["stop", "reject"] = "stop"
    # The job stops when more than this share of a source's samples is rejected or loses a part,
    # or more than this share of its pictures is dropped.
    max_reject_rate: float = 0.05
    # How often each training sample is used: 2.0 twice, 0.5 every second one.
    repeat: float = 1.0
    # Instead of `repeat`: the source's share of the decoder tokens among all sources that have a weight.
    weight: float = 0.0

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError("paths is empty; name at least one file")
        if not 0 < self.repeat < math.inf or not 0 <= self.weight < math.inf:
            raise ValueError(
                f"repeat must be above 0 and weight not below, got {self.repeat} and {self.weight}"
            )
        if self.weight and self.repeat != 1:
            raise ValueError(
                f"weight {self.weight} and repeat {self.repeat} are two answers to one question; set one"
            )
        if not 0 <= self.max_reject_rate <= 1:
            raise ValueError(f"max_reject_rate must lie in [0, 1], got {self.max_reject_rate}")

    def files(self, tokenizer: Path) -> list[Path]:
        """Files beside `paths` that decide what is read: with another content the scan is made again, and the data set
        is another one, which keeps them with its tokenizer."""
        return []


@dataclass(frozen=True, slots=True)
class SourceContext:
    """What a reader may need beyond its own settings."""

    name: str
    tokenizer: Path
    tokens: TokenNames
    # Beyond it a picture or a video is rejected by its size: what has to hold contents in memory need not hold such.
    max_media_bytes: int = 64 << 20
    max_video_bytes: int = 128 << 20
    # Of one page of a Parquet file, unpacked: it is read as a whole.
    max_page_bytes: int = 328_000_000


class Source(Protocol):
    """The reader of one input format. A unit is one raw file, the grain of the scan."""

    def units(self) -> list[str]:
        """The raw files, patterns expanded, sorted, each once.

        Raises:
            UserError: a path does not exist or a pattern matches nothing.
        """
        ...

    def scan(self, unit: str) -> Iterator[RawSample | Reject]:
        """Every sample of the unit, usable or not, in file order.

        Raises:
            BadFileError: the unit as a whole cannot be read.
            OSError: it cannot be read now; the executor tries again.
        """
        ...


def scan_or_reject(
    entries: Iterator[RawSample | Reject], *, source: str, unit: str, bad_file: Literal["stop", "reject"]
) -> Iterator[RawSample | Reject]:
    """What `Source.scan` yields for a unit, with a file that cannot be read as one reject if that is wanted.

    Raises:
        UserError: it cannot be read, and `bad_file` is "stop".
    """
    try:
        yield from entries
    except BadFileError as error:
        if bad_file == "stop":
            raise UserError(
                f"source {source!r}: {error}; or take it out of sources.{source}.paths, or set "
                f'sources.{source}.bad_file = "reject"'
            ) from None
        yield Reject(source, f"{os.path.basename(shown(unit))}#file", error.reason, str(error))
