"""One file per input format."""

from __future__ import annotations

import functools
import glob
from pathlib import Path

from preprocess.config import SourceConfig
from preprocess.samples import Source
from preprocess.sources.webdataset import WebDataset
from shared.errors import UserError

_FORMATS = {"webdataset": WebDataset}


@functools.lru_cache(maxsize=32)
def open_source(name: str, config: SourceConfig) -> Source:
    """The reader of a source; cached, so that a worker keeps its files open between units."""
    return _FORMATS[config.format](name, config)


def list_units(name: str, config: SourceConfig) -> list[str]:
    """The raw files of a source, patterns expanded, sorted, each once.

    Raises:
        UserError: a path does not exist or a pattern matches nothing.
    """
    units: set[str] = set()
    for path in config.paths:
        found = sorted(glob.glob(path)) if glob.has_magic(path) else [path]
        if not found:
            raise UserError(
                f"source {name!r}: pattern {path!r} matches no file; correct sources.{name}.paths"
            )
        for entry in found:
            if not Path(entry).is_file():
                raise UserError(f"source {name!r}: {entry}: no such file; correct sources.{name}.paths")
            units.add(entry)
    return sorted(units)
