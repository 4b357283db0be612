"""Chat data: conversations with pictures and videos, rendered by the tokenizer's own template; answers are learned.

    record -> turns -> template -> [text, picture, text, ..]          .json .jsonl .parquet .arrow

Whose words are whose is known to the character, so that nothing a user writes is learned or becomes a special token.
A picture given by URL is missing (`image_not_fetched`) until `fetch` has put its bytes there.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from preprocess.samples import VIDEO, Media, Missing, RawSample, Reject, Segment, Text
from preprocess.sources.base import SourceConfig, SourceContext
from preprocess.sources.chat_rendering import specials_of
from preprocess.sources.chat_template import load_template
from preprocess.sources.chat_text import chat_texts
from preprocess.sources.chat_turns import ChatError, Habits, Named, read_conversation
from preprocess.sources.pictures import check_max_images, over_max_images, picture, picture_root, video
from preprocess.sources.records import keyed_records
from preprocess.sources.saved import expand_tables
from shared.tokens import load_tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatConfig(SourceConfig):
    """Conversations of LLaVA, ShareGPT or OpenAI habit."""

    format: Literal["chat"] = "chat"
    # Which of the assistant's turns are learned.
    learn: Literal["all", "last"] = "all"
    # A Jinja file instead of the tokenizer's own template; relative to the tokenizer's directory.
    template: str = ""
    # Which template, where the tokenizer has several.
    template_name: str = "default"
    # What day it is for a template that asks, YYYY-MM-DD; without one it falls back to its own or is refused.
    date: str = ""
    # Where relative paths of pictures and videos begin; itself relative to the directory of the file that names them.
    image_root: str = ""
    # What stands for a picture, and for a video, in a turn that is one string; "" for nothing does. Where a record
    # names videos and no picture, the marker of pictures stands for them too, as in LLaVA-Video's data.
    image_marker: str = "<image>"
    video_marker: str = "<video>"
    # Pictures and videos of a conversation beyond so many are dropped and counted; 0 keeps all.
    max_images_per_document: int = 0
    # A record whose pictures have no place in any turn: rejected, or all of them before the first question.
    unmarked_images: Literal["reject", "first"] = "reject"
    # Turns behind the last of the assistant: the record is rejected, or they are left out, with their pictures.
    unanswered: Literal["reject", "cut"] = "reject"

    def __post_init__(self) -> None:
        SourceConfig.__post_init__(self)
        check_max_images(self.max_images_per_document, self.bad_media)
        if self.image_marker and self.image_marker == self.video_marker:
            raise ValueError(f"image_marker and video_marker are both {self.image_marker!r}; change one")
        try:
            datetime.date.fromisoformat(self.date or "2000-01-01")
        except ValueError:
            raise ValueError(f"date must be YYYY-MM-DD, got {self.date!r}") from None

    def files(self, tokenizer: Path) -> list[Path]:
        return [tokenizer / self.template] if self.template else []


class Chat:
    """A source of conversations in JSON, JSON lines and tables."""

    def __init__(self, config: ChatConfig, context: SourceContext) -> None:
        self._config, self._name = config, context.name
        self._most_page = context.max_page_bytes
        file = next(iter(config.files(context.tokenizer)), None)
        self._template = load_template(
            context.tokenizer, file=file, name=config.template_name, date=config.date
        )
        self._specials = specials_of(load_tokenizer(context.tokenizer, context.tokens))
        self._habits = Habits(
            config.image_marker, config.video_marker, config.unmarked_images, config.unanswered
        )

    def units(self) -> list[str]:
        return expand_tables(self._name, self._config.paths)

    def scan(self, unit: str) -> Iterator[RawSample | Reject]:
        root = picture_root(unit, self._config.image_root)
        for row in keyed_records(self._name, unit, None, "", self._most_page):
            if isinstance(row, Reject):
                yield row
                continue
            key, record = row
            # The same picture's conversations often share an id: it is told, but tells nothing apart.
            if isinstance(record.get("id"), (str, int)):
                key = f"{key}/{record['id']}"
            try:
                yield RawSample(key, tuple(self._segments(record, root)))
            except ChatError as error:
                yield Reject(self._name, key, error.reason, str(error))

    def _segments(self, record: dict[str, Any], root: str) -> list[Segment]:
        conversation = read_conversation(record, self._habits)
        texts, numbers = chat_texts(conversation, self._template, self._specials, self._config.learn)
        segments: list[Segment] = [texts[0]]
        for place, (number, text) in enumerate(zip(numbers, texts[1:], strict=True)):
            segments += [self._media(conversation.media[number], place, root), text]
        return [segment for segment in segments if not isinstance(segment, Text) or segment.text]

    def _media(self, named: Named, place: int, root: str) -> Media | Missing:
        if over := over_max_images(place, self._config.max_images_per_document):
            return over
        return (video if named.kind == VIDEO else picture)(named.value, root)
