"""Texts to tokens, once: ids, and which of them are learned.

A text may name spans that are special tokens (a chat template's own) and spans that are learned (the assistant's
turns). Between special tokens it is tokenized in one go, template and content together, so that the tokens are
those that inference will see; what is learned follows from the offsets of that one tokenization.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from preprocess.samples import Text
from shared.tokens import TextTokenizer, Tokens

# Characters of plain text that are tokenized in one go, which takes some 120 times their size in memory. At the
# borders of the pieces of a longer text tokens may differ from those of one tokenization.
PIECE = 1 << 20

Spans = tuple[tuple[int, int], ...]


class TextError(ValueError):
    """A text that is rejected: `reason` is counted, the message is the detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def encode_texts(texts: Sequence[Text], tokenizer: TextTokenizer) -> list[Tokens | TextError]:
    """int32 ids of each text, ~id where the token is not learned."""
    plain = [number for number, text in enumerate(texts) if text.learned is None and not text.special]
    result: list[Tokens | TextError] = [TextError("", "")] * len(texts)
    short = [number for number in plain if len(texts[number].text) <= PIECE]
    for inner in (False, True):
        group = [number for number in short if texts[number].inner is inner]
        encoded = tokenizer.encode([texts[n].text for n in group], inner=inner) if group else []
        suspicious = bool(group) and tokenizer.are_special(np.concatenate(encoded)).any()
        for number, ids in zip(group, encoded, strict=True):
            result[number] = _checked(ids, texts[number].text, tokenizer) if suspicious else ids
    for number in sorted(set(plain) - set(short)):
        text, inner = texts[number].text, texts[number].inner
        pieces = [tokenizer.encode([piece], inner=inner or start > 0)[0] for start, piece in _pieces(text)]
        result[number] = _checked(np.concatenate(pieces), text, tokenizer)
    marked = [number for number, text in enumerate(texts) if text.learned is not None or text.special]
    for number, found in zip(marked, _encode_marked([texts[n] for n in marked], tokenizer), strict=True):
        result[number] = found
    return result


def _pieces(text: str) -> Iterator[tuple[int, str]]:
    """A long text in pieces of at most PIECE characters with their places, cut behind a paragraph, a line or a word."""
    start = 0
    while start < len(text):
        end = start + PIECE
        if end < len(text):
            borders = (text.rfind(mark, start, end) + len(mark) for mark in ("\n\n", "\n", " "))
            end = next((border for border in borders if border > start + PIECE // 2), end)
        yield start, text[start:end]
        start = end


def _checked(ids: Tokens, text: str, tokenizer: TextTokenizer) -> Tokens | TextError:
    if tokenizer.are_special(ids).any():
        return TextError("special_token_in_text", f"text {text[:60]!r}")
    return ids


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Characters from `start` on of text `number`: a special token, or what lies between two.

    learned: all of it, nothing, or, with None, a part.
    """

    number: int
    start: int
    text: str
    special: bool
    inner: bool
    learned: bool | None


def _encode_marked(texts: Sequence[Text], tokenizer: TextTokenizer) -> list[Tokens | TextError]:
    """Texts with spans. All stretches of all texts are tokenized in one go."""
    stretches = [stretch for number, text in enumerate(texts) for stretch in _stretches(number, text)]
    encoded, unknown = _encode_stretches(stretches, tokenizer)
    lengths = [len(ids) for ids, _ in encoded]
    borders = np.cumsum([0, *lengths])
    ids = np.array([number for numbers, _ in encoded for number in numbers], np.int32)
    owners = np.repeat(np.array([stretch.number for stretch in stretches], np.int64), lengths)
    special = np.repeat(np.array([stretch.special for stretch in stretches], bool), lengths)
    learned = np.repeat(np.array([stretch.learned is True for stretch in stretches], bool), lengths)
    within = [np.array(text.learned or (), np.int64).reshape(-1, 2) for text in texts]
    for number, (stretch, (_, offsets)) in enumerate(zip(stretches, encoded, strict=True)):
        if stretch.learned is None:
            spans_n2 = np.array(offsets, np.int64).reshape(-1, 2) + stretch.start
            learned[borders[number] : borders[number + 1]] = _overlaps(spans_n2, within[stretch.number])
    wrong = set(owners[~special & tokenizer.are_special(ids)].tolist())
    values = np.split(np.where(learned, ids, ~ids), np.searchsorted(owners, np.arange(1, len(texts))))
    result: list[Tokens | TextError] = []
    for number, text in enumerate(texts):
        if number in unknown:
            result.append(TextError("not_a_special_token", f"{unknown[number]!r} is not in the vocabulary"))
        elif number in wrong:
            result.append(TextError("special_token_in_text", f"text {text.text[:60]!r}"))
        else:
            result.append(values[number])
    return result


def _stretches(number: int, text: Text) -> Iterator[_Stretch]:
    learned_before = _learned_before(text.learned) if text.learned is not None else None
    position = 0
    for start, end in (*text.special, (len(text.text), len(text.text))):
        for first, last, special in ((position, start, False), (start, end, True)):
            if first < last:
                length = last - first
                if learned_before is not None:
                    length = learned_before(last) - learned_before(first)
                learned = length > 0 if length in (0, last - first) else None
                inner = text.inner or first > 0
                yield _Stretch(number, first, text.text[first:last], special, inner, learned)
        position = end


def _learned_before(learned: Spans) -> Callable[[int], int]:
    """How many characters before a place are learned. A conversation has thousands of spans, and asks for each."""
    starts = [start for start, _ in learned]
    before = list(accumulate((end - start for start, end in learned), initial=0))

    def count(place: int) -> int:
        number = bisect_right(starts, place) - 1
        return before[number] + min(place, learned[number][1]) - starts[number] if number >= 0 else 0

    return count


Encoded = tuple[list[int], list[tuple[int, int]]]


def _encode_stretches(
    stretches: Sequence[_Stretch], tokenizer: TextTokenizer
) -> tuple[list[Encoded], dict[int, str]]:
    """Ids of each, with offsets where a part is learned; by text, what it wrongly takes for a special token."""
    encoded: list[Encoded] = [([], [])] * len(stretches)
    unknown: dict[int, str] = {}
    groups: dict[tuple[bool, bool], list[int]] = {}
    for number, stretch in enumerate(stretches):
        if not stretch.special:
            groups.setdefault((stretch.inner, stretch.learned is None), []).append(number)
        elif (identifier := tokenizer.tokenizer.token_to_id(stretch.text)) is None:
            unknown[stretch.number] = stretch.text
        else:
            encoded[number] = [identifier], [(0, len(stretch.text))]
    for (inner, partly), numbers in groups.items():
        texts = [stretches[number].text for number in numbers]
        if partly:
            found = tokenizer.encode_with_offsets(texts, inner=inner)
        else:
            # The template's own stretches are the same in every conversation.
            unique = list(dict.fromkeys(texts))
            ids = dict(zip(unique, (i.tolist() for i in tokenizer.encode(unique, inner=inner)), strict=True))
            found: list[Encoded] = [(ids[text], []) for text in texts]
        for number, pair in zip(numbers, found, strict=True):
            encoded[number] = pair
    return encoded, unknown


def _overlaps(spans_n2: np.ndarray, learned_m2: np.ndarray) -> np.ndarray:
    """Which spans share a character with one of `learned_m2` (sorted, disjoint); an empty span shares none.

    A token that begins before the assistant's first character and reaches into its turn, such as a space merged
    with a word, is learned: it is the assistant's to say.
    """
    starts, ends = learned_m2.T
    # The first that ends behind the token's start.
    first = np.searchsorted(ends, spans_n2[:, 0], side="right")
    inside = first < len(ends)
    begins = starts[np.minimum(first, max(0, len(starts) - 1))] if len(starts) else np.zeros(len(spans_n2))
    return inside & (begins < spans_n2[:, 1]) & (spans_n2[:, 0] < spans_n2[:, 1])
