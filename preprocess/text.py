"""Texts to tokens, once: ids, and which of them are learned.

A text may name spans that are special tokens (a chat template's own) and spans that are learned (the assistant's
turns). Between special tokens it is tokenized in one go, template and content together, so that the tokens are
those that inference will see; what is learned follows from the offsets of that one tokenization.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from preprocess.samples import Text
from shared.tokens import TextTokenizer, Tokens

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
    for number, ids in zip(plain, tokenizer.encode([texts[n].text for n in plain]), strict=True):
        result[number] = _checked(ids, texts[number].text, tokenizer)
    marked = [number for number, text in enumerate(texts) if text.learned is not None or text.special]
    for number, found in zip(marked, _encode_marked([texts[n] for n in marked], tokenizer), strict=True):
        result[number] = found
    return result


def _checked(ids: Tokens, text: str, tokenizer: TextTokenizer) -> Tokens | TextError:
    if tokenizer.are_special(ids).any():
        return TextError("special_token_in_text", f"text {text[:60]!r}")
    return ids


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Characters from `start` on of one of several texts: a special token, or what lies between two."""

    number: int
    start: int
    text: str
    special: bool
    inner: bool


def _encode_marked(texts: Sequence[Text], tokenizer: TextTokenizer) -> list[Tokens | TextError]:
    """Texts with spans: all stretches of all texts in one call, each token with the characters it was made from."""
    stretches = [stretch for number, text in enumerate(texts) for stretch in _stretches(number, text)]
    encoded = _encode_stretches(stretches, tokenizer)
    lengths = np.array([len(ids) for ids, _ in encoded], np.int64)
    ids = np.array([number for numbers, _ in encoded for number in numbers], np.int32)
    spans_n2 = np.array([span for _, offsets in encoded for span in offsets], np.int64).reshape(-1, 2)
    spans_n2 += np.repeat(np.array([stretch.start for stretch in stretches], np.int64), lengths)[:, None]
    owners = np.repeat(np.array([stretch.number for stretch in stretches], np.int64), lengths)
    from_text = ~np.repeat(np.array([stretch.special for stretch in stretches], bool), lengths)
    wrong = set(owners[from_text & tokenizer.are_special(ids)].tolist())
    unknown = {
        s.number: s.text for s, (found, _) in zip(stretches, encoded, strict=True) if s.special and not found
    }
    borders = np.searchsorted(owners, np.arange(len(texts) + 1)).tolist()
    result: list[Tokens | TextError] = []
    for number, text in enumerate(texts):
        here = slice(borders[number], borders[number + 1])
        if number in unknown:
            result.append(TextError("not_a_special_token", f"{unknown[number]!r} is not in the vocabulary"))
        elif number in wrong:
            result.append(TextError("special_token_in_text", f"text {text.text[:60]!r}"))
        elif text.learned is None:
            result.append(ids[here])
        else:
            result.append(np.where(_overlaps(spans_n2[here], text.learned), ids[here], ~ids[here]))
    return result


def _stretches(number: int, text: Text) -> Iterator[_Stretch]:
    position = 0
    for start, end in (*text.special, (len(text.text), len(text.text))):
        if position < start:
            inner = text.inner or position > 0
            yield _Stretch(number, position, text.text[position:start], special=False, inner=inner)
        if start < end:
            yield _Stretch(number, start, text.text[start:end], special=True, inner=True)
        position = end


def _encode_stretches(
    stretches: Sequence[_Stretch], tokenizer: TextTokenizer
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Ids and offsets of each; a special token that there is not has none."""
    encoded: list[tuple[list[int], list[tuple[int, int]]]] = [([], [])] * len(stretches)
    for inner in (False, True):
        chosen = [n for n, s in enumerate(stretches) if not s.special and s.inner == inner]
        found = tokenizer.encode_with_offsets([stretches[n].text for n in chosen], inner=inner)
        for number, pair in zip(chosen, found, strict=True):
            encoded[number] = pair
    names = {stretch.text for stretch in stretches if stretch.special}
    ids = {name: number for name in names if (number := tokenizer.tokenizer.token_to_id(name)) is not None}
    for number, stretch in enumerate(stretches):
        if stretch.special and stretch.text in ids:
            encoded[number] = [ids[stretch.text]], [(0, len(stretch.text))]
    return encoded


def _overlaps(spans_n2: np.ndarray, learned: Spans) -> np.ndarray:
    """Which spans share a character with one of `learned` (sorted, disjoint); an empty span shares none.

    A token that begins before the assistant's first character and reaches into its turn, such as a space merged
    with a word, is learned: it is the assistant's to say.
    """
    starts = np.array([start for start, _ in learned], np.int64)
    ends = np.array([end for _, end in learned], np.int64)
    first = np.searchsorted(
        ends, spans_n2[:, 0], side="right"
    )  # the first that ends behind the token's start
    inside = first < len(ends)
    begins = starts[np.minimum(first, max(0, len(starts) - 1))] if len(starts) else np.zeros(len(spans_n2))
    return inside & (begins < spans_n2[:, 1]) & (spans_n2[:, 0] < spans_n2[:, 1])
