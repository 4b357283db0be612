"""A rendered conversation as texts between pictures: what is learned, what is a special token.

    "<s>[INST] P\nWhat? [/INST] A cat. </s>"  ->  "[INST] ", picture, "\nWhat? [/INST] A cat. "
                                                                            learned ^^^^^^^

Learned is the text of assistant turns, and the special token that the template puts directly behind it, or behind
white space, which is learned then too: without it the turn would never end. A template that says itself what the
assistant generates is believed instead. The begin and end of text that the stream has anyway are taken off.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Literal

from preprocess.samples import Text
from preprocess.sources.chat_rendering import Rendering, Span, Specials, render_conversation
from preprocess.sources.chat_template import PICTURE, ChatTemplate
from preprocess.sources.chat_turns import Conversation, Turn

_SPACE = re.compile(r"\s*")
# What tokenizers take for white space: Unicode's list, where Python has four control characters more.
_WHITE = (
    "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
)
_SWALLOWED = re.compile(f"[{_WHITE}]*")


def chat_texts(
    conversation: Conversation, template: ChatTemplate, specials: Specials, learn: Literal["all", "last"]
) -> tuple[list[Text], list[int]]:
    """The texts between pictures, one more than there are pictures (some may be empty), and the pictures' numbers.

    Raises:
        ChatError: the template refuses or changes it, or it holds what would become a token that it is not.
    """
    rendering = render_conversation(conversation, template, specials)
    turns = conversation.turns
    first = 0
    if learn == "last":
        first = 1 + max((n for n, turn in enumerate(turns) if turn.role != "assistant"), default=-1)
    if template.marks_generation:
        learned = _generated(rendering, first)
    else:
        learned = _answers(rendering, turns, first, specials.bos)
    removed = _removed(rendering, specials)
    text, moved = _without(rendering.text, removed)
    # A text whose begin of text was the template's own is tokenized as what follows it.
    begun = bool(removed) and removed[0][0] == 0
    texts = _cut(text, list(map(moved, learned)), list(map(moved, rendering.special)), begun)
    return texts, [number for _, turn in rendering.contents for number in turns[turn].media]


def _answers(rendering: Rendering, turns: Sequence[Turn], first: int, bos: str | None) -> list[Span]:
    """The texts of the assistant from turn `first` on, each with the special token behind it, a begin of text aside."""
    ends = {start: end for start, end in rendering.special if rendering.text[start:end] != bos}
    learned: list[Span] = []
    for (start, end), number in rendering.contents:
        if turns[number].role == "assistant" and number >= first:
            behind = _SPACE.match(rendering.text, end)
            learned.append((start, ends.get(behind.end(), end) if behind else end))
    return learned


def _generated(rendering: Rendering, first: int) -> list[Span]:
    """What the template says is generated, behind the last text before turn `first`."""
    before = max(((number, end) for (_, end), number in rendering.contents if number < first), default=(0, 0))
    return [span for span in rendering.generated if span[0] >= before[1]]


def _removed(rendering: Rendering, specials: Specials) -> list[Span]:
    """What the stream writes itself, and the white space that special tokens swallow; sorted, disjoint."""
    text, special = rendering.text, rendering.special
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


def _cut(text: str, learned: Sequence[Span], special: Sequence[Span], begun: bool) -> list[Text]:
    """Texts between the pictures, spans from the start of each. `begun`: something precedes the first."""
    borders = [-1, *(match.start() for match in re.finditer(PICTURE, text)), len(text)]
    learned_in, special_in = _within(learned), _within(special)
    return [
        Text(
            text[before + 1 : end],
            learned_in(before + 1, end),
            special_in(before + 1, end),
            inner=begun or before >= 0,
        )
        for before, end in pairwise(borders)
    ]


def _within(spans: Sequence[Span]) -> Callable[[int, int], tuple[Span, ...]]:
    """What of the spans (in order, disjoint) lies in [first, last), counted from there."""
    starts, ends = [start for start, _ in spans], [end for _, end in spans]

    def cut(first: int, last: int) -> tuple[Span, ...]:
        near = spans[bisect_right(ends, first) : bisect_left(starts, last)]
        return tuple(
            (max(start, first) - first, min(end, last) - first) for start, end in near if start < end
        )

    return cut
