"""A conversation as text: rendered once, with what is content, what is a special token and what is learned in it.

    conversation -> render -> "<|im_start|>user\nP\nWhat?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
                 -> render with CONTENT n CONTENT_END in place of the n-th text: what is left is the template's own
                 -> special tokens, in the template's own text only; what is learned; cut at the pictures P

Learned is the text of assistant turns, and the special token that the template puts directly behind it, or behind
white space, which is learned then too: without it the turn would never end. A template that says itself what the
assistant generates is believed instead. The begin and end of text that the stream has anyway are taken off.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Literal

from preprocess.samples import Text
from preprocess.sources.chat_template import (
    CONTENT,
    CONTENT_END,
    GENERATED,
    GENERATED_END,
    NONCHARACTERS,
    PICTURE,
    ChatTemplate,
    Message,
    TemplateError,
)
from preprocess.sources.chat_turns import ChatError, Conversation, Turn
from shared.tokens import TextTokenizer

Span = tuple[int, int]

_SENTINEL = re.compile(f"{CONTENT}([0-9]+){CONTENT_END}")
_GENERATION = re.compile(f"{GENERATED}|{GENERATED_END}")
_SPACE = re.compile(r"\s*")
# What tokenizers take for white space: Unicode's list, where Python has four control characters more.
_WHITE = (
    "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
)
_SWALLOWED = re.compile(f"[{_WHITE}]*")


@dataclass(frozen=True, slots=True)
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
class Rendering:
    """text: without marks of generation. template: what of it is the template's own; contents: the rest, in the

    order of the text, with the number of the turn. generated: what the template says the assistant generates.
    """

    text: str
    template: list[Span]
    contents: list[tuple[Span, int]]
    generated: list[Span]


def chat_texts(
    conversation: Conversation, template: ChatTemplate, specials: Specials, learn: Literal["all", "last"]
) -> tuple[list[Text], list[int]]:
    """The texts between pictures, one more than there are pictures (some may be empty), and the pictures' numbers.

    Raises:
        ChatError: the template refuses or changes it, or it holds what would become a token that it is not.
    """
    rendering = render_conversation(conversation, template, specials)
    turns = conversation.turns
    special = [
        match.span()
        for start, end in rendering.template
        for match in specials.pattern.finditer(rendering.text, start, end)
    ]
    if wrong := {rendering.text[start:end] for start, end in special} & specials.reserved:
        raise ChatError("template_writes_reserved_token", ", ".join(sorted(wrong)))
    if template.marks_generation:
        learned = _generated(rendering, turns, learn)
    else:
        learned = _answers(rendering, turns, special, learn)
    removed = _removed(rendering, special, specials)
    text, moved = _without(rendering.text, removed)
    texts = _cut(text, list(map(moved, learned)), list(map(moved, special)))
    # A text whose begin of text was the template's own is tokenized as what follows it.
    begun = bool(removed) and removed[0][0] == 0
    texts = [replace(text, inner=n > 0 or begun) for n, text in enumerate(texts)]
    return texts, [number for _, turn in rendering.contents for number in turns[turn].pictures]


def render_conversation(conversation: Conversation, template: ChatTemplate, specials: Specials) -> Rendering:
    """Render twice, and take the first apart by what the second shows to be the template's own.

    Raises:
        ChatError: the template refuses it, or shows a text not once and as it is (or without white space around).
    """
    turns = conversation.turns
    _check_extras(conversation, template, specials)
    # White space alone may be left out by a condition, or stripped away: it is rendered as it is both times.
    marked = [
        turn.text if not turn.text.strip() else f"{CONTENT}{n}{CONTENT_END}" for n, turn in enumerate(turns)
    ]
    try:
        real = template.render(_messages(turns, [turn.text for turn in turns], template), conversation.tools)
        bare = template.render(_messages(turns, marked, template), conversation.tools)
    except TemplateError as error:
        raise ChatError("template_refuses", str(error)[:500]) from None
    pieces = _SENTINEL.split(bare)
    order = [int(number) for number in pieces[1::2]]
    for number, turn in enumerate(turns):
        if turn.text.strip() and (shown := order.count(number)) != 1:
            raise ChatError("template_changes_content", f"turn {number} ({turn.role}) is shown {shown} times")
    return _rendering(pieces[::2], _as_shown(real, pieces[::2], order, turns), order)


def _messages(turns: Sequence[Turn], texts: Sequence[str], template: ChatTemplate) -> list[Message]:
    return [
        {"role": turn.role, "content": template.content(text), **turn.extras}
        for turn, text in zip(turns, texts, strict=True)
    ]


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
    written = json.dumps(beside, ensure_ascii=False, default=str)
    found = specials.pattern.search(written) or re.search(
        f"[{NONCHARACTERS[0]}-{NONCHARACTERS[-1]}]", written
    )
    if found:
        raise ChatError("special_token_in_fields", f"{found.group()!r} in tools, tool calls or names")


def _as_shown(real: str, pieces: Sequence[str], order: Sequence[int], turns: Sequence[Turn]) -> list[str]:
    """The texts as the real rendering has them: piece, text, piece, text, .. piece."""
    shown: list[str] = []
    position = len(pieces[0])
    if not real.startswith(pieces[0]):
        raise ChatError("template_changes_content", "what it writes at the start depends on the texts")
    for number, piece in zip(order, pieces[1:], strict=True):
        turn = turns[number]
        text = next((text for text in _variants(turn.text) if real.startswith(text + piece, position)), None)
        if text is None:
            found = f"turn {number} ({turn.role}) is not shown as it is: {real[position:][:60]!r}"
            raise ChatError("template_changes_content", found)
        shown.append(text)
        position += len(text) + len(piece)
    if position != len(real):
        raise ChatError("template_changes_content", f"the texts make it write more: {real[position:][:60]!r}")
    return shown


def _variants(text: str) -> list[str]:
    """A text as templates show it, longest first."""
    variants = {text, text.strip(), text.lstrip(), text.rstrip()}
    variants |= {text.strip("\n"), text.lstrip("\n"), text.rstrip("\n")}
    return sorted(variants, key=len, reverse=True)


def _rendering(pieces: Sequence[str], shown: Sequence[str], order: Sequence[int]) -> Rendering:
    """The text without the marks of generation, and the places in it."""
    kept: list[str] = []
    template: list[Span] = []
    contents: list[tuple[Span, int]] = []
    marks: list[int] = []
    length = 0
    for number, piece in enumerate(pieces):
        stretches = _GENERATION.split(piece)
        ends = list(accumulate(map(len, stretches), initial=length))
        marks += ends[1:-1]
        template.append((length, ends[-1]))
        kept += stretches
        length = ends[-1]
        if number < len(shown):
            contents.append(((length, length + len(shown[number])), order[number]))
            kept.append(shown[number])
            length += len(shown[number])
    generated = list(zip(marks[::2], marks[1::2], strict=True))
    return Rendering("".join(kept), template, contents, generated)


def _answers(
    rendering: Rendering, turns: Sequence[Turn], special: Sequence[Span], learn: Literal["all", "last"]
) -> list[Span]:
    """The texts of the assistant, each with the special token behind it."""
    last = max(number for number, turn in enumerate(turns) if turn.role == "assistant")
    ends = dict(special)
    learned: list[Span] = []
    for (start, end), number in rendering.contents:
        if turns[number].role == "assistant" and (learn == "all" or number == last):
            behind = _SPACE.match(rendering.text, end)
            learned.append((start, ends.get(behind.end(), end) if behind else end))
    return learned


def _generated(rendering: Rendering, turns: Sequence[Turn], learn: Literal["all", "last"]) -> list[Span]:
    """What the template says; of it, the last turn is all behind the last text that is not the assistant's."""
    others = [end for (_, end), number in rendering.contents if turns[number].role != "assistant"]
    first = max(others, default=0) if learn == "last" else 0
    return [span for span in rendering.generated if span[0] >= first]


def _removed(rendering: Rendering, special: Sequence[Span], specials: Specials) -> list[Span]:
    """What the stream writes itself, and the white space that special tokens swallow; sorted, disjoint."""
    text = rendering.text
    removed: list[Span] = []
    before = 0
    for start, end in special:
        name = text[start:end]
        if start == 0 and name == specials.bos:
            removed.append((start, end))
        if name in specials.lstrip:
            removed.append((before + len(text[before:start].rstrip(_WHITE)), start))
        if name in specials.rstrip and (space := _SWALLOWED.match(text, end)):
            removed.append((end, space.end()))
        before = end
    if special and text[slice(*special[-1])] == specials.eos and not text[special[-1][1] :].strip():
        removed.append((special[-1][0], len(text)))
    merged: list[Span] = []
    for start, end in sorted(span for span in removed if span[0] < span[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _without(text: str, removed: Sequence[Span]) -> tuple[str, Callable[[Span], Span]]:
    """The text without the spans, and where a span of it lies then; one that is gone is empty."""
    starts = [start for start, _ in removed]
    lost = list(accumulate((end - start for start, end in removed), initial=0))

    def moved(position: int) -> int:
        number = bisect_right(starts, position) - 1
        if number < 0:
            return position
        start, end = removed[number]
        return start - lost[number] if position < end else position - lost[number + 1]

    borders = [0, *(position for span in removed for position in span), len(text)]
    kept = "".join(text[start:end] for start, end in zip(borders[::2], borders[1::2], strict=True))
    return kept, lambda span: (moved(span[0]), moved(span[1]))


def _cut(text: str, learned: Sequence[Span], special: Sequence[Span]) -> list[Text]:
    """Texts between the pictures, spans from the start of each."""
    borders = [-1, *(match.start() for match in re.finditer(PICTURE, text)), len(text)]
    texts: list[Text] = []
    for first, last in pairwise(borders):
        first += 1

        def inside(spans: Sequence[Span], first: int = first, last: int = last) -> tuple[Span, ...]:
            clipped = ((max(start, first) - first, min(end, last) - first) for start, end in spans)
            return tuple(span for span in clipped if span[0] < span[1])

        texts.append(Text(text[first:last], inside(learned), inside(special)))
    return texts
