"""Documents of plain text: a column of a table, a field of JSON lines, or whole files.

A file whose name is that of a container (`records.SUFFIXES`) holds many documents; any other (.txt, .md, .py,
also as .gz or .zst) is one document, with FOLDER/NAME as its key.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

import pyarrow as pa

from preprocess.inputs import open_input
from preprocess.samples import RawSample, Reject, Text
from preprocess.sources.base import SourceConfig, SourceContext
from preprocess.sources.record import MAX_RECORD_BYTES, is_damage
from preprocess.sources.records import container_of, keyed_records, unpacked
from preprocess.sources.saved import expand_tables
from shared.remote import shown


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig(SourceConfig):
    """Documents without pictures."""

    format: Literal["text"] = "text"
    # Column or field of the document, and of its key; without one the key is NAME#ROW.
    text: str = "text"
    key: str = ""
    too_long: Literal["split", "reject"] = "split"

    def __post_init__(self) -> None:
        SourceConfig.__post_init__(self)
        if not self.text:
            raise ValueError("text is empty; name the column of the documents")


class TextSource:
    """A source of texts."""

    def __init__(self, config: TextConfig, context: SourceContext) -> None:
        self._config, self._name = config, context.name
        self._most_page = context.max_page_bytes

    def units(self) -> list[str]:
        return expand_tables(self._name, self._config.paths)

    def scan(self, unit: str) -> Iterator[RawSample | Reject]:
        if not container_of(unit):
            yield self._document(*self._whole_file(unit))
            return
        columns = [name for name in (self._config.text, self._config.key) if name]
        for row in keyed_records(self._name, unit, columns, self._config.key, self._most_page):
            if isinstance(row, Reject):
                yield row
            else:
                yield self._document(row[0], row[1].get(self._config.text))

    def _document(self, key: str, text: object) -> RawSample | Reject:
        """`text` may be a reject already."""
        if isinstance(text, Reject):
            return text
        if not isinstance(text, str):
            kind = "null or not there" if text is None else type(text).__name__
            return Reject(self._name, key, "no_text", f"{self._config.text!r} is {kind}, expected text")
        if not text.strip():
            return Reject(self._name, key, "text_empty", f"{len(text)} characters of white space")
        return RawSample(key, (Text(text),))

    def _whole_file(self, unit: str) -> tuple[str, str | Reject]:
        key = "/".join(PurePath(shown(unit)).parts[-2:])

        def lost(reason: str, detail: str) -> tuple[str, Reject]:
            return key, Reject(self._name, key, reason, detail)

        try:
            with closing(open_input(unit)) as file:
                data = unpacked(unit, file).read(MAX_RECORD_BYTES + 1)
        except (OSError, pa.ArrowException) as error:
            if not is_damage(error):
                raise
            return lost("text_unreadable", str(error))
        if len(data) > MAX_RECORD_BYTES:
            return lost("text_too_many_bytes", f"more than {MAX_RECORD_BYTES}")
        try:
            return key, data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return lost("text_not_utf8", str(error))
