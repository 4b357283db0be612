"""One file per input format: its settings, and the reader that makes samples of its files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from preprocess.samples import RawSample, Reject
from preprocess.sources.base import Source, SourceConfig, SourceContext, scan_or_reject
from preprocess.sources.captions import Captions, CaptionsConfig
from preprocess.sources.chat import Chat, ChatConfig
from preprocess.sources.interleaved import Interleaved, InterleavedConfig
from preprocess.sources.text import TextConfig, TextSource
from preprocess.sources.webdataset import WebDataset, WebDatasetConfig

AnySource = WebDatasetConfig | CaptionsConfig | InterleavedConfig | TextConfig | ChatConfig

_READERS: dict[type[SourceConfig], Callable[[Any, SourceContext], Source]] = {
    WebDatasetConfig: WebDataset,
    CaptionsConfig: Captions,
    InterleavedConfig: Interleaved,
    TextConfig: TextSource,
    ChatConfig: Chat,
}


@dataclass(frozen=True, slots=True)
class _Tolerant:
    """A reader whose unreadable files are rejects where its config says so."""

    reader: Source
    config: SourceConfig
    name: str

    def units(self) -> list[str]:
        return self.reader.units()

    def scan(self, unit: str) -> Iterator[RawSample | Reject]:
        entries = self.reader.scan(unit)
        return scan_or_reject(entries, source=self.name, unit=unit, bad_file=self.config.bad_file)


@lru_cache(maxsize=32)
def open_source(config: AnySource, context: SourceContext) -> Source:
    """The reader of a source; cached, so that a worker opens tokenizers and templates once."""
    return _Tolerant(_READERS[type(config)](config, context), config, context.name)
