"""One file per input format: its settings, and the reader that makes samples of its files."""

from __future__ import annotations

from functools import lru_cache

from preprocess.sources.base import Source, SourceContext
from preprocess.sources.webdataset import WebDataset, WebDatasetConfig

AnySource = WebDatasetConfig


@lru_cache(maxsize=32)
def open_source(config: AnySource, context: SourceContext) -> Source:
    """The reader of a source; cached, so that a worker opens tokenizers and templates once."""
    return WebDataset(config, context)
