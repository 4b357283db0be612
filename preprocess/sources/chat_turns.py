"""A record of chat data, of whatever habit, as one kind of conversation.

    {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, ..], "image": ..}       LLaVA, ShareGPT
    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", ..}]}, ..], "images": [..]}

A picture becomes one noncharacter in the text of its turn, so that any template that renders text renders it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from preprocess.sources.chat_template import NONCHARACTERS, PICTURE

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
TURNS = ("conversations", "messages")
PICTURES = ("images", "image")
# What a template may show of a message beside its text.
EXTRAS = ("name", "tool_calls", "tool_call_id", "reasoning_content")

_RESERVED = re.compile(f"[{NONCHARACTERS[0]}-{NONCHARACTERS[-1]}]")


class ChatError(ValueError):
    """A conversation that is rejected: `reason` is counted, the message is the detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Turn:
    """text: PICTURE where a picture stands. pictures: which ones, in the order of the text."""

    role: str
    text: str
    pictures: tuple[int, ...]
    extras: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """pictures: what the record says of each, see `preprocess.sources.pictures`."""

    turns: list[Turn]
    pictures: list[Any]
    tools: Any


def read_conversation(
    record: dict[str, Any],
    *,
    marker: str = "<image>",
    unmarked_images: Literal["reject", "first"] = "reject",
    unanswered: Literal["reject", "cut"] = "reject",
) -> Conversation:
    """Turns, pictures and tools of a record; the settings are those of `ChatConfig`.

    Raises:
        ChatError: it is no conversation from which an answer can be learned.
    """
    pictures = _pictures(record)
    turns = list(_turns(record, pictures, marker))
    roles = [turn.role for turn in turns]
    if "assistant" not in roles:
        raise ChatError("no_assistant_turn", f"{len(turns)} turns: {', '.join(roles[:20])}")
    if unmarked_images == "first" and pictures and not any(turn.pictures for turn in turns):
        turns = _with_pictures_first(turns, len(pictures))
    placed = [number for turn in turns for number in turn.pictures]
    if sorted(placed) != list(range(len(pictures))):
        raise ChatError(
            "image_count_differs", f"{len(pictures)} images, {len(placed)} places for them in the turns"
        )
    answered = len(turns) - roles[::-1].index("assistant")
    if answered < len(turns):
        if unanswered == "reject":
            raise ChatError(
                "unanswered_turn",
                f'turn {answered} ({roles[answered]}) has no answer; set unanswered = "cut" to leave it out',
            )
        turns = turns[:answered]
    return Conversation(turns, pictures, _tools(record))


def _pictures(record: dict[str, Any]) -> list[Any]:
    value = next((record[name] for name in PICTURES if record.get(name) is not None), [])
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _turns(record: dict[str, Any], pictures: list[Any], marker: str) -> Iterator[Turn]:
    """Turns in order; `pictures` grows by those that a turn brings along."""
    name = next((name for name in TURNS if record.get(name) is not None), "")
    entries = record.get(name)
    if not isinstance(entries, (list, tuple)) or not entries:
        found = f"{name} is {_short(entries)}" if name else f"none of the fields {', '.join(TURNS)}"
        raise ChatError("no_turns", found)
    if isinstance(system := record.get("system"), str) and system.strip():
        entries = [{"role": "system", "content": system}, *entries]
    upcoming = iter(range(len(pictures)))
    for number, entry in enumerate(cast(Sequence[Any], entries)):
        if not isinstance(entry, dict):
            raise ChatError("turn_not_object", f"turn {number} is {_short(entry)}")
        fields = cast(dict[str, Any], entry)
        yield _turn(f"turn {number}", fields, pictures, upcoming, marker)


def _turn(
    where: str, fields: dict[str, Any], pictures: list[Any], upcoming: Iterator[int], marker: str
) -> Turn:
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
        parts = [_part(where, part, pictures, upcoming, placed) for part in cast(Sequence[Any], content)]
        text = "".join(parts)
    elif isinstance(content, str) or content is None:
        parts = _checked(where, content or "").split(marker) if marker else [_checked(where, content or "")]
        placed = [next(upcoming, len(pictures)) for _ in parts[1:]]
        text = PICTURE.join(parts)
    else:
        raise ChatError("content_not_text", f"{where} ({role}): {keys[1]} is {_short(content)}")
    if not text.strip() and role in ("user", "assistant") and "tool_calls" not in extras:
        raise ChatError("turn_empty", f"{where} ({role}) has no text")
    return Turn(role, text, tuple(placed), extras)


def _part(where: str, part: Any, pictures: list[Any], upcoming: Iterator[int], placed: list[int]) -> str:
    """The text of one part of a turn's content; a picture in it is added to `placed`."""
    if isinstance(part, str):
        return _checked(where, part)
    fields = cast(dict[str, Any], part) if isinstance(part, dict) else {}
    match fields.get("type"):
        case "text" | "input_text" | "output_text":
            if not isinstance(fields.get("text"), str):
                raise ChatError(
                    "content_not_text", f"{where}: a text part holds {_short(fields.get('text'))}"
                )
            return _checked(where, fields["text"])
        case "image" | "image_url" | "input_image":
            keys = ("image_url", "image", "url", "path", "base64", "bytes")
            own = next((fields[key] for key in keys if fields.get(key) is not None), None)
            if own is not None:
                placed.append(len(pictures))
                pictures.append(own)
            elif isinstance(index := fields.get("index"), int):
                placed.append(index)
            else:
                placed.append(next(upcoming, len(pictures)))
            return PICTURE
        case kind:
            raise ChatError(
                "part_unknown", f"{where}: a part of type {_short(kind)}; known: text, image, image_url"
            )


def _with_pictures_first(turns: list[Turn], count: int) -> list[Turn]:
    """All pictures before the text of the first user turn, as LLaVA's own data has them, each on a line."""
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
