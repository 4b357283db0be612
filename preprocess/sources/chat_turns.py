"""A record of chat data, of whatever habit, as one kind of conversation.

    {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, ..], "image": ..}       LLaVA, ShareGPT
    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", ..}]}, ..], "images": [..]}
    {"conversations": [{"from": "human", "value": "<video>\nWhat?"}, ..], "video": ..}

A picture or a video becomes one noncharacter in the text of its turn, so that any template that renders text renders
it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, cast

from preprocess.samples import IMAGE, VIDEO
from preprocess.sources.chat_template import NONCHARACTERS, PICTURE

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
TURNS = ("conversations", "messages")
# Fields of a record that name what its turns show, and the types of parts that do, each with the fields that it may
# bring along.
FIELDS = {IMAGE: ("images", "image"), VIDEO: ("videos", "video")}
PARTS = {
    **dict.fromkeys(("image", "image_url", "input_image"), IMAGE),
    **dict.fromkeys(("video", "video_url", "input_video"), VIDEO),
}
PART_FIELDS = {
    IMAGE: ("image_url", "image", "url", "path", "base64", "bytes"),
    VIDEO: ("video_url", "video", "url", "path", "base64", "bytes"),
}
WORDS = {IMAGE: "image", VIDEO: "video"}
# What a template may show of a message beside its text.
EXTRAS = ("name", "tool_calls", "tool_call_id", "reasoning_content")

_RESERVED = re.compile(f"[{NONCHARACTERS[0]}-{NONCHARACTERS[-1]}]")


class ChatError(ValueError):
    """A conversation that is rejected: `reason` is counted, the message is the detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Named:
    """A picture or a video as a record names it: `value` is for `preprocess.sources.pictures`."""

    kind: int
    value: Any


@dataclass(frozen=True, slots=True)
class Turn:
    """text: PICTURE where a picture or a video stands. media: which ones, in the order of the text."""

    role: str
    text: str
    media: tuple[int, ...]
    extras: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """media: all pictures and videos, those of the record's own fields first."""

    turns: list[Turn]
    media: list[Named]
    tools: Any


@dataclass(frozen=True, slots=True)
class Habits:
    """What stands for a picture and for a video in a turn that is one string ("" for nothing does), and what becomes
    of records of odd habits; the settings are those of `ChatConfig`."""

    image_marker: str = "<image>"
    video_marker: str = "<video>"
    unmarked_images: Literal["reject", "first"] = "reject"
    unanswered: Literal["reject", "cut"] = "reject"


@dataclass(slots=True)
class _Media:
    """What a record names, how far its turns have placed it, and how many places of each kind they have."""

    named: list[Named]
    # By kind: the numbers of the record's own fields.
    own: dict[int, range]
    upcoming: dict[int, Iterator[int]]
    places: Counter[int] = field(default_factory=Counter[int])

    def next(self, kind: int) -> int:
        """The number of what stands at the next place; one that is none, where there are more places."""
        if not self.own[IMAGE] and self.own[VIDEO]:
            kind = VIDEO  # LLaVA-Video's own data marks its videos as pictures
        self.places[kind] += 1
        return next(self.upcoming[kind], len(self.named))

    def at(self, kind: int, index: int) -> int:
        """The number of entry `index` of the record's own field."""
        self.places[kind] += 1
        return self.own[kind].start + index

    def add(self, kind: int, value: Any) -> int:
        """The number of something that a part brings along."""
        self.places[kind] += 1
        self.named.append(Named(kind, value))
        return len(self.named) - 1

    def check(self, placed: Sequence[int]) -> None:
        """Raises: ChatError: not everything has one place."""
        if sorted(placed) == list(range(len(self.named))):
            return
        count = Counter(named.kind for named in self.named)
        # Where as many places name the same one twice, it is one of the kind that there is.
        kind = next(
            (kind for kind in WORDS if count[kind] != self.places[kind]), IMAGE if count[IMAGE] else VIDEO
        )
        raise ChatError(
            f"{WORDS[kind]}_count_differs",
            f"{count[kind]} {WORDS[kind]}s, {self.places[kind]} places for them in the turns",
        )


USUAL = Habits()


def read_conversation(record: dict[str, Any], habits: Habits = USUAL) -> Conversation:
    """Turns, pictures, videos and tools of a record.

    Raises:
        ChatError: it is no conversation from which an answer can be learned.
    """
    media = _media(record)
    turns = list(_turns(record, media, habits))
    roles = [turn.role for turn in turns]
    if "assistant" not in roles:
        raise ChatError("no_assistant_turn", f"{len(turns)} turns: {', '.join(roles[:20])}")
    if habits.unmarked_images == "first" and media.named and not any(turn.media for turn in turns):
        turns = _with_media_first(turns, len(media.named))
    media.check([number for turn in turns for number in turn.media])
    answered = len(turns) - roles[::-1].index("assistant")
    if answered < len(turns):
        if habits.unanswered == "reject":
            raise ChatError(
                "unanswered_turn",
                f'turn {answered} ({roles[answered]}) has no answer; set unanswered = "cut" to leave it out',
            )
        turns = turns[:answered]
    return Conversation(turns, media.named, _tools(record))


def picture_places(record: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Where a record names its pictures, in order: a dict or list, and the key or index of the value there."""
    if name := _first(record, FIELDS[IMAGE]):
        value = record[name]
        yield from ((value, n) for n in range(len(value))) if isinstance(value, list) else [(record, name)]
    entries = record.get(_first(record, TURNS) or "")
    for entry in _dicts(entries):
        for part in _dicts(entry.get("value" if "from" in entry else "content")):
            if _part_kind(part) == IMAGE and (name := _first(part, PART_FIELDS[IMAGE])):
                yield part, name


def _dicts(value: Any) -> list[dict[str, Any]]:
    """The objects in a list; none where it is no list."""
    entries = cast(list[Any], value) if isinstance(value, list) else []
    return [cast(dict[str, Any], entry) for entry in entries if isinstance(entry, dict)]


def _part_kind(part: dict[str, Any]) -> int | None:
    """Whether a part is a picture, a video, or neither."""
    name = part.get("type")
    return PARTS.get(name) if isinstance(name, str) else None


def _first(fields: dict[str, Any], names: Sequence[str]) -> str | None:
    """The first of the names under which there is something."""
    return next((name for name in names if fields.get(name) is not None), None)


def _media(record: dict[str, Any]) -> _Media:
    """What the record names beside its turns."""
    named: list[Named] = []
    own: dict[int, range] = {}
    for kind, names in FIELDS.items():
        name = _first(record, names)
        value = record[name] if name else []
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        own[kind] = range(len(named), len(named) + len(values))
        named += [Named(kind, entry) for entry in values]
    return _Media(named, own, {kind: iter(numbers) for kind, numbers in own.items()})


def _turns(record: dict[str, Any], media: _Media, habits: Habits) -> Iterator[Turn]:
    """Turns in order; `media` grows by what a turn brings along."""
    name = _first(record, TURNS) or ""
    entries = record.get(name)
    if not isinstance(entries, (list, tuple)) or not entries:
        found = f"{name} is {_short(entries)}" if name else f"none of the fields {', '.join(TURNS)}"
        raise ChatError("no_turns", found)
    if isinstance(system := record.get("system"), str) and system.strip():
        entries = [{"role": "system", "content": system}, *entries]
    for number, entry in enumerate(cast(Sequence[Any], entries)):
        if not isinstance(entry, dict):
            raise ChatError("turn_not_object", f"turn {number} is {_short(entry)}")
        yield _turn(f"turn {number}", cast(dict[str, Any], entry), media, habits)


def _turn(where: str, fields: dict[str, Any], media: _Media, habits: Habits) -> Turn:
    keys = ("from", "value") if "from" in fields else ("role", "content")
    spoken, content = (fields.get(key) for key in keys)
    role = ROLES.get(spoken.lower()) if isinstance(spoken, str) else None
    if role is None:
        raise ChatError("role_unknown", f"{where}: {keys[0]} is {_short(spoken)}; known: {', '.join(ROLES)}")
    extras = {name: fields[name] for name in EXTRAS if fields.get(name)}
    if content is None and not (role == "assistant" and "tool_calls" in extras):
        raise ChatError("content_missing", f"{where} ({role}): {keys[1]} is null or absent")
    placed: list[int] = []
    if isinstance(content, (list, tuple)):
        text = "".join(_part(where, part, media, placed) for part in cast(Sequence[Any], content))
    elif isinstance(content, str) or content is None:
        marker = _marker(habits.image_marker, habits.video_marker)
        text = _checked(where, content or "")
        kinds = (VIDEO if mark == habits.video_marker else IMAGE for mark in marker.findall(text))
        placed = [media.next(kind) for kind in kinds]
        text = marker.sub(PICTURE, text)
    else:
        raise ChatError("content_not_text", f"{where} ({role}): {keys[1]} is {_short(content)}")
    if not text.strip() and role in ("user", "assistant") and "tool_calls" not in extras:
        raise ChatError("turn_empty", f"{where} ({role}) has no text")
    return Turn(role, text, tuple(placed), extras)


@lru_cache(maxsize=16)
def _marker(*markers: str) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(marker) for marker in markers if marker) or r"(?!)")


def _part(where: str, part: Any, media: _Media, placed: list[int]) -> str:
    """The text of one part of a turn's content; a picture or a video in it is added to `placed`."""
    if isinstance(part, str):
        return _checked(where, part)
    fields = cast(dict[str, Any], part) if isinstance(part, dict) else {}
    if fields.get("type") in ("text", "input_text", "output_text"):
        if not isinstance(fields.get("text"), str):
            raise ChatError("content_not_text", f"{where}: a text part holds {_short(fields.get('text'))}")
        return _checked(where, fields["text"])
    kind = _part_kind(fields)
    if kind is None:
        known = f"known: text, {', '.join(PARTS)}"
        raise ChatError("part_unknown", f"{where}: a part of type {_short(fields.get('type'))}; {known}")
    if name := _first(fields, PART_FIELDS[kind]):
        placed.append(media.add(kind, fields[name]))
    elif isinstance(index := fields.get("index"), int):
        placed.append(media.at(kind, index))
    else:
        placed.append(media.next(kind))
    return PICTURE


def _with_media_first(turns: list[Turn], count: int) -> list[Turn]:
    """All pictures and videos before the text of the first user turn, as LLaVA's own data has them, each on a line."""
    at = next((number for number, turn in enumerate(turns) if turn.role == "user"), None)
    if at is None:
        return turns
    turn = turns[at]
    first = Turn("user", f"{PICTURE}\n" * count + turn.text, tuple(range(count)), turn.extras)
    return [*turns[:at], first, *turns[at + 1 :]]


def _tools(record: dict[str, Any]) -> Any:
    """Tools that the assistant may call: objects, or the same as JSON in a string, as tables have them."""
    tools = record.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            return json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise ChatError("tools_invalid", f"tools: not JSON ({error})") from None
    return tools or None


def _checked(where: str, text: str) -> str:
    if found := _RESERVED.search(text):
        raise ChatError(
            "reserved_character", f"{where}: U+{ord(found.group()):04X}, which Unicode keeps out of texts"
        )
    return text


def _short(value: object) -> str:
    return "null" if value is None else repr(value)[:60]
