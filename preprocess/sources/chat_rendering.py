"""A conversation rendered, and to the character what of it is the template's own.

Rendered twice: with the texts, and with CONTENT n CONTENT_END in place of the n-th text. What stands between those is
the template's own; with the texts between (as they are, or as it strips them) it must give the first rendering again.
That depends on no search for texts, which may repeat each other or look like a template.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

from preprocess.sources.chat_template import (
    CONTENT,
    CONTENT_END,
    GENERATED,
    GENERATED_END,
    NONCHARACTERS,
    ChatTemplate,
    Message,
    TemplateError,
)
from preprocess.sources.chat_turns import ChatError, Conversation, Turn
from shared.tokens import TextTokenizer

Span = tuple[int, int]

_SENTINEL = re.compile(f"{CONTENT}([0-9]+){CONTENT_END}")
_GENERATION = re.compile(f"{GENERATED}|{GENERATED_END}")


@dataclass(frozen=True, eq=False, slots=True)
class Specials:
    """The tokenizer's special tokens. lstrip, rstrip: those that swallow the white space before or behind them.

    bos, eos: what the stream begins and ends with. reserved: what only the stream may write.
    """

    pattern: re.Pattern[str]
    lstrip: frozenset[str]
    rstrip: frozenset[str]
    bos: str | None
    eos: str
    reserved: frozenset[str]


def specials_of(tokenizer: TextTokenizer) -> Specials:
    ids = tokenizer.ids
    added = tokenizer.tokenizer.get_added_tokens_decoder()
    special = {number: token for number, token in added.items() if token.special}
    # As the tokenizer does it: at one place the longest wins.
    names = sorted((token.content for token in special.values()), key=len, reverse=True)
    reserved = {ids.image, ids.begin_image, ids.end_image} | ({ids.pad} - {ids.eos})
    return Specials(
        pattern=re.compile("|".join(map(re.escape, names)) or r"(?!)"),
        lstrip=frozenset(token.content for token in special.values() if token.lstrip),
        rstrip=frozenset(token.content for token in special.values() if token.rstrip),
        bos=None if ids.bos is None else tokenizer.tokenizer.id_to_token(ids.bos),
        eos=tokenizer.tokenizer.id_to_token(ids.eos) or "",
        reserved=frozenset(name for i in reserved if (name := tokenizer.tokenizer.id_to_token(i))),
    )


@dataclass(frozen=True, slots=True)
class Piece:
    """What the template writes between two texts. shown: with the marks of generation, text: without.

    special, marks: spans of special tokens and places of the marks in `text`.
    """

    shown: str
    text: str
    special: tuple[Span, ...]
    marks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Outline:
    """A rendering without its texts: they stand between the pieces, `order` says which turn's."""

    pieces: tuple[Piece, ...]
    order: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rendering:
    """A rendering without marks.

    contents: the texts in their order, each with the number of its turn. special: the template's special tokens.
    generated: what the template says that the assistant generates.
    """

    text: str
    contents: list[tuple[Span, int]]
    special: list[Span]
    generated: list[Span]


def render_conversation(conversation: Conversation, template: ChatTemplate, specials: Specials) -> Rendering:
    """Render, and take it apart by what the rendering without the texts shows to be the template's own.

    Raises:
        ChatError: the template refuses it, or shows a text not once and as it is (or without white space around).
    """
    turns, tools = conversation.turns, conversation.tools
    # White space alone may be left out by a condition, or stripped away: it stays what it is in the outline.
    shape = tuple((turn.role, None if turn.text.strip() else turn.text) for turn in turns)
    messages = [{"role": turn.role, "content": template.content(turn.text), **turn.extras} for turn in turns]
    try:
        real = template.render(messages, tools)
        if tools is None and not any(turn.extras for turn in turns):
            outline = _plain_outline(shape, template, specials)
        else:
            _check_extras(conversation, template, specials)
            outline = _outline(shape, [turn.extras for turn in turns], tools, template, specials)
            _check_tools_shown(outline, shape, conversation, template, specials)
    except TemplateError as error:
        raise ChatError("template_refuses", str(error)[:500]) from None
    return _rendering(outline, _as_shown(real, outline, turns))


Shape = tuple[tuple[str, str | None], ...]


# Most conversations of a data set have the roles of many others: all that depends on them alone is kept.
@lru_cache(maxsize=4096)
def _plain_outline(shape: Shape, template: ChatTemplate, specials: Specials) -> Outline:
    return _outline(shape, [{}] * len(shape), None, template, specials)


def _outline(
    shape: Shape, extras: Sequence[dict[str, Any]], tools: Any, template: ChatTemplate, specials: Specials
) -> Outline:
    """Render with CONTENT n CONTENT_END in place of the n-th text."""
    messages: list[Message] = []
    for number, ((role, blank), more) in enumerate(zip(shape, extras, strict=True)):
        text = f"{CONTENT}{number}{CONTENT_END}" if blank is None else blank
        messages.append({"role": role, "content": template.content(text), **more})
    pieces = _SENTINEL.split(template.render(messages, tools))
    order = tuple(map(int, pieces[1::2]))
    shown = Counter(order)
    for number, (role, blank) in enumerate(shape):
        if blank is None and (times := shown[number]) != 1:
            raise ChatError("template_changes_content", f"turn {number} ({role}) is shown {times} times")
    return Outline(tuple(_piece(piece, specials) for piece in pieces[::2]), order)


def _piece(shown: str, specials: Specials) -> Piece:
    stretches = _GENERATION.split(shown)
    text = "".join(stretches)
    special = tuple(match.span() for match in specials.pattern.finditer(text))
    if wrong := {text[start:end] for start, end in special} & specials.reserved:
        raise ChatError("template_writes_reserved_token", ", ".join(sorted(wrong)))
    return Piece(shown, text, special, tuple(accumulate(map(len, stretches[:-1]))))


def _check_extras(conversation: Conversation, template: ChatTemplate, specials: Specials) -> None:
    """What the template shows beside the texts counts as its own: it must not spell a special token."""
    for number, turn in enumerate(conversation.turns):
        if "reasoning_content" in turn.extras and not template.marks_generation:
            raise ChatError(
                "reasoning_not_marked",
                f"turn {number}: without {{% generation %}} in the template nobody knows how much of its reasoning "
                f"is learned",
            )
    beside = [turn.extras for turn in conversation.turns if turn.extras] + [conversation.tools]
    try:
        written = json.dumps(beside, ensure_ascii=False, default=str)
    except RecursionError as error:
        raise ChatError("special_token_in_fields", f"nested too deeply to look through ({error})") from None
    found = specials.pattern.search(written) or re.search(
        f"[{NONCHARACTERS[0]}-{NONCHARACTERS[-1]}]", written
    )
    if found:
        raise ChatError("special_token_in_fields", f"{found.group()!r} in tools, tool calls or names")


def _check_tools_shown(
    outline: Outline, shape: Shape, conversation: Conversation, template: ChatTemplate, specials: Specials
) -> None:
    """A template that knows no tools leaves them out without a word, and calls too."""
    extras = [turn.extras for turn in conversation.turns]
    without = [{name: value for name, value in more.items() if name != "tool_calls"} for more in extras]
    for what, there, changed in (
        ("tools", conversation.tools is not None, (extras, None)),
        ("tool_calls", without != extras, (without, conversation.tools)),
    ):
        try:
            if there and _outline(shape, *changed, template, specials) == outline:
                raise ChatError(
                    "template_leaves_out_tools", f"{what} are not shown; take a template that does"
                )
        except TemplateError:
            pass  # it cannot do without them: it shows them


def _as_shown(real: str, outline: Outline, turns: Sequence[Turn]) -> list[str]:
    """The texts as the real rendering has them: piece, text, piece, text, .. piece."""
    first, *pieces = outline.pieces
    if not real.startswith(first.shown):
        raise ChatError("template_changes_content", "what it writes at the start depends on the texts")
    texts: list[str] = []
    position = len(first.shown)
    for number, piece in zip(outline.order, pieces, strict=True):
        text = turns[number].text
        if not real.startswith(text + piece.shown, position):
            variants = (v for v in _variants(text) if real.startswith(v + piece.shown, position))
            if (text := next(variants, None)) is None:
                found = (
                    f"turn {number} ({turns[number].role}) is not shown as it is: {real[position:][:60]!r}"
                )
                raise ChatError("template_changes_content", found)
        texts.append(text)
        position += len(text) + len(piece.shown)
    if position != len(real):
        raise ChatError("template_changes_content", f"the texts make it write more: {real[position:][:60]!r}")
    return texts


def _variants(text: str) -> list[str]:
    """A text as templates show it, longest first."""
    variants = {text, text.strip(), text.lstrip(), text.rstrip()}
    variants |= {text.strip("\n"), text.lstrip("\n"), text.rstrip("\n")}
    return sorted(variants, key=len, reverse=True)


def _rendering(outline: Outline, texts: Sequence[str]) -> Rendering:
    """Pieces and texts put together, and the places in the whole."""
    kept: list[str] = []
    contents: list[tuple[Span, int]] = []
    special: list[Span] = []
    marks: list[int] = []
    length = 0
    for piece, text, number in zip(outline.pieces, (*texts, ""), (*outline.order, -1), strict=True):
        special += [(start + length, end + length) for start, end in piece.special]
        marks += [mark + length for mark in piece.marks]
        length += len(piece.text)
        contents.append(((length, length + len(text)), number))
        length += len(text)
        kept += (piece.text, text)
    generated = list(zip(marks[::2], marks[1::2], strict=True))
    return Rendering("".join(kept), contents[:-1], special, generated)
