"""Texts to tokens, once: ids, and which of them are learned.

A text may name spans that are special tokens (a chat template's own) and spans that are learned (the assistant's
turns). Between special tokens it is tokenized in one go, template and content together, so that the tokens are
those that inference will see; what is learned follows from the offsets of that one tokenization.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    for number in marked:
        result[number] = _encode_marked(texts[number], tokenizer)
    return result


def _checked(ids: Tokens, text: str, tokenizer: TextTokenizer) -> Tokens | TextError:
    if tokenizer.holds_special(ids):
        return TextError("special_token_in_text", f"text {text[:60]!r}")
    return ids


def _encode_marked(text: Text, tokenizer: TextTokenizer) -> Tokens | TextError:
    """Stretches between special tokens one by one, each with its offsets."""
    ids: list[Tokens] = []
    spans: list[tuple[int, int]] = []
    position = 0
    for start, end in (*text.special, (len(text.text), len(text.text))):
        if stretch := text.text[position:start]:
            tokens, offsets = tokenizer.encode_with_offsets(stretch, inner=text.inner or position > 0)
            if isinstance(checked := _checked(tokens, stretch, tokenizer), TextError):
                return checked
            ids.append(tokens)
            spans += [(first + position, last + position) for first, last in offsets]
        if end > start:
            identifier = tokenizer.tokenizer.token_to_id(text.text[start:end])
            if identifier is None:
                return TextError("not_a_special_token", f"{text.text[start:end]!r} is not in the vocabulary")
            ids.append(np.array([identifier], np.int32))
            spans.append((start, end))
        position = end
    tokens = np.concatenate([*ids, np.empty(0, np.int32)])
    if text.learned is None:
        return tokens
    return np.where(_overlaps(np.array(spans, np.int64).reshape(-1, 2), text.learned), tokens, ~tokens)


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
