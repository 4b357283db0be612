"""Interleaved documents in the schema of OBELICS: two lists of one length, `texts` and `images`.

    texts   ["Before.", null,   "After."]           images  [null,  b"..",  null]

In Parquet, Arrow or JSON lines; a picture is whatever `pictures.picture` knows. At an index that holds both, the
picture comes first, as its caption follows a picture; where both are null there is nothing. Texts that follow
each other are joined with `separator`, also where a picture between them was lost; white space is the document's
own, but a text of nothing else is no text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

from preprocess.samples import RawSample, Reject, Segment, Text
from preprocess.sources.base import SourceConfig, SourceContext
from preprocess.sources.pictures import check_max_images, over_max_images, picture, picture_root
from preprocess.sources.records import Value, keyed_records
from preprocess.sources.saved import expand_tables


@dataclass(frozen=True, kw_only=True, slots=True)
class InterleavedConfig(SourceConfig):
    """Web documents with pictures between their paragraphs."""

    format: Literal["interleaved"] = "interleaved"
    # Columns of the two lists, and of the key; without one the key is NAME#ROW.
    texts: str = "texts"
    images: str = "images"
    key: str = ""
    # What stands between two texts that no picture separates.
    separator: str = "\n\n"
    # Where paths of pictures begin: a folder, absolute or relative to the table's own. No path leads out of it.
    image_root: str = ""
    # Pictures of a document beyond so many are dropped and counted; 0 keeps all.
    max_images_per_document: int = 0
    too_long: Literal["split", "reject"] = "split"
    bad_media: Literal["reject", "drop"] = "drop"

    def __post_init__(self) -> None:
        SourceConfig.__post_init__(self)
        check_max_images(self.max_images_per_document, self.bad_media)


class MalformedError(ValueError):
    """A document that is none: `reason` is counted, the message is the detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Interleaved:
    """A source of documents of texts and pictures."""

    def __init__(self, config: InterleavedConfig, context: SourceContext) -> None:
        self._config, self._name = config, context.name
        self._most_page = context.max_page_bytes

    def units(self) -> list[str]:
        return expand_tables(self._name, self._config.paths)

    def scan(self, unit: str) -> Iterator[RawSample | Reject]:
        config = self._config
        root = picture_root(unit, config.image_root)
        columns = [name for name in (config.texts, config.images, config.key) if name]
        for row in keyed_records(self._name, unit, columns, config.key, self._most_page):
            if isinstance(row, Reject):
                yield row
                continue
            key, value = row
            try:
                yield RawSample(key, self._segments(value, root), config.separator)
            except MalformedError as error:
                yield Reject(self._name, key, error.reason, str(error))

    def _segments(self, value: Value, root: str) -> tuple[Segment, ...]:
        """Raises: MalformedError."""
        texts, images = (self._list(value, column) for column in (self._config.texts, self._config.images))
        # A list that is null holds nothing, wherever the other one has something.
        texts = [None] * len(images or ()) if texts is None else texts
        images = [None] * len(texts) if images is None else images
        if len(texts) != len(images):
            raise MalformedError("lengths_differ", f"{len(texts)} texts and {len(images)} images")
        segments: list[Segment] = []
        seen = 0
        for text, image in zip(texts, images, strict=True):
            if image is not None:
                limit = self._config.max_images_per_document
                segments.append(over_max_images(seen, limit) or picture(image, root))
                seen += 1
            if text is not None and not isinstance(text, str):
                raise MalformedError("text_malformed", f"expected text or null, got {type(text).__name__}")
            if text and not text.isspace():
                segments.append(Text(text))
        if not segments:
            raise MalformedError(
                "document_empty", f"{len(texts)} texts and images, none of which holds anything"
            )
        return tuple(segments)

    @staticmethod
    def _list(value: Value, column: str) -> list[Any] | None:
        found = value.get(column)
        if found is not None and not isinstance(found, list):
            raise MalformedError("list_malformed", f"{column!r} is {type(found).__name__}, expected a list")
        return cast("list[Any] | None", found)
