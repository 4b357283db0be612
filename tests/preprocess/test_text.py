"""Texts to tokens in one tokenization: what is special, what is learned, what is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from preprocess import text
from preprocess.samples import Text
from preprocess.text import TextError, encode_texts
from shared.tokens import TextTokenizer, Tokens, load_tokenizer
from tests.preprocess.inputs import byte_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> TextTokenizer:
    """One token per byte, the special ones behind."""
    return load_tokenizer(byte_tokenizer(tmp_path))


def shown(tokenizer: TextTokenizer, found: np.ndarray | TextError) -> str:
    """Learned tokens in capitals, special ones as a dollar."""
    assert not isinstance(found, TextError), found
    special = tokenizer.are_special(np.where(found < 0, ~found, found))
    words = [tokenizer.decode([int(max(token, ~token))]) for token in found]
    marked = ["$" if is_special else word for word, is_special in zip(words, special, strict=True)]
    return "".join(word.upper() if token >= 0 else word for word, token in zip(marked, found, strict=True))


def test_all_is_learned_or_what_the_spans_say(tokenizer: TextTokenizer) -> None:
    texts = [
        Text("abc"),
        Text("abcdef", learned=((1, 2), (4, 6))),
        Text("abc", learned=()),
        Text("xx<|pad|>yz", special=((2, 9),)),
        Text("<|pad|>xy<|pad|>", learned=((8, 16),), special=((0, 7), (9, 16))),
        Text("", learned=()),
    ]
    found = encode_texts(texts, tokenizer)
    assert [shown(tokenizer, ids) for ids in found] == ["ABC", "aBcdEF", "abc", "XX$YZ", "$xY$", ""]
    pad = tokenizer.ids.pad
    assert found[4].tolist()[::3] == [~pad, pad]  # type: ignore[union-attr]  # no TextError, above
    assert all(ids.dtype == np.int32 for ids in found if not isinstance(ids, TextError))


def test_a_conversation_of_thousands_of_turns_costs_what_its_length_does(tokenizer: TextTokenizer) -> None:
    # "q<|pad|>ab<|pad|>" again and again: of "ab" the second letter is learned, or both with what follows.
    turn, count = "q<|pad|>ab<|pad|>", 5000
    begins = range(0, len(turn) * count, len(turn))
    special = tuple((n + start, n + end) for n in begins for start, end in ((1, 8), (10, 17)))
    learned = tuple((n + 9 - n // len(turn) % 2, n + 17) for n in begins)
    begun = time.process_time()
    [found] = encode_texts([Text(turn * count, learned=learned, special=special)], tokenizer)
    # Half a minute where each stretch asks all spans.
    assert time.process_time() - begun < 5
    assert not isinstance(found, TextError)
    assert ((found >= 0).reshape(-1, 10) == [0, 0, 0, 1, 1, 0, 0, 1, 1, 1]).all()
    assert shown(tokenizer, found[:10]) == "q$aB$q$AB$"


def test_a_long_text_is_tokenized_in_pieces_that_end_with_a_paragraph_a_line_or_a_word(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "PIECE", 10)
    asked: list[list[str]] = []
    encode = TextTokenizer.encode

    def noted(self: TextTokenizer, texts: Sequence[str], *, inner: bool = False) -> list[Tokens]:
        asked.append([*texts, str(inner)])
        return encode(self, texts, inner=inner)

    monkeypatch.setattr(TextTokenizer, "encode", noted)
    long = "one two\n\nthree\nx four five sixseveneight\n\n"
    found = encode_texts([Text("short"), Text(long), Text("abc", learned=())], tokenizer)
    assert [shown(tokenizer, ids) for ids in found] == ["SHORT", long.upper(), "abc"]
    # "five " would be half a piece, and what has no border is cut where it is.
    pieces = ["three\n", "x four ", "five sixse", "veneight\n\n"]
    first = [["short", "False"], ["one two\n\n", "False"]]
    assert asked == [*first, *([piece, "True"] for piece in pieces), ["abc", "False"]]


def test_a_name_that_is_no_special_token_and_a_text_that_becomes_one_cost_their_own_text(
    tmp_path: Path,
) -> None:
    directory = byte_tokenizer(tmp_path)
    content = json.loads((directory / "tokenizer.json").read_text())
    # An ordinary added token plays the part of padding.
    pad = load_tokenizer(directory).ids.pad
    content["added_tokens"].append(
        {**content["added_tokens"][0], "id": 262, "content": "qq", "special": False}
    )
    (directory / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "qq"}))
    tokenizer = load_tokenizer(directory)
    assert tokenizer.ids.pad == 262 != pad
    texts = [
        Text("qq"),
        Text("aqqb", learned=()),
        Text("ab", learned=()),
        Text("ab", special=((0, 1), (1, 2))),
    ]
    texts += [Text("<|nobody|>", special=((0, 10),)), Text("qq", special=((0, 2),)), Text("c")]
    found = encode_texts(texts, tokenizer)
    reasons = [ids.reason if isinstance(ids, TextError) else shown(tokenizer, ids) for ids in found]
    assert reasons == [
        "special_token_in_text",
        "special_token_in_text",
        "ab",
        "AB",  # single bytes are in the vocabulary
        "not_a_special_token",
        "$",
        "C",
    ]


def test_a_token_across_the_border_is_learned_if_the_learned_text_reaches_into_it(shared_data: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "tokenizer-bpe8k")
    text = "of the cat"
    [whole] = tokenizer.encode([text])
    pieces = [tokenizer.decode([int(token)]) for token in whole]
    assert pieces[:2] == ["of", " the"]
    for first, expected in ((2, 1), (3, 1), (5, 1), (6, 2), (0, 0)):
        [found] = encode_texts([Text(text, learned=((first, len(text)),))], tokenizer)
        assert not isinstance(found, TextError)
        assert (np.where(found < 0, ~found, found) == whole).all() and int((found < 0).sum()) == expected
