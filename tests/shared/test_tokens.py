"""Special tokens, and text that can never become one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from shared.errors import UserError
from shared.tokens import (
    TextTokenizer,
    TokenNames,
    kept_files,
    load_tokenizer,
    tokenizer_files,
    tokenizer_hash,
)

# The eleven special strings of both tokenizers, in id order.
SPECIALS = [
    "<|image|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|pad|>",
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


@pytest.fixture(scope="module")
def tokenizer(shared_data: Path) -> TextTokenizer:
    """Byte-level BPE: loses nothing."""
    return load_tokenizer(shared_data / "tokenizer-bpe8k")


@pytest.fixture
def directory(shared_data: Path, tmp_path: Path) -> Path:
    """A copy that may be edited."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(shared_data / "tokenizer-bpe8k" / name, tmp_path / name)
    return tmp_path


def edit(
    directory: Path, change: Callable[[dict[str, Any]], Any], name: str = "tokenizer_config.json"
) -> Path:
    content = json.loads((directory / name).read_text(encoding="utf-8"))
    change(content)
    (directory / name).write_text(json.dumps(content), encoding="utf-8")
    return directory


def refusal(directory: Path, names: TokenNames | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_tokenizer(directory, names)
    message = str(caught.value)
    assert str(directory) in message and "\n" not in message
    return message


# Ids


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("tokenizer-bpe8k", 8181),
        # tokenizer.json has no added tokens here: the ids hold only after added_tokens_decoder is applied.
        ("tokenizer", 1998),
    ],
)
def test_special_ids_are_those_of_the_tokenizers_own_files(shared_data: Path, name: str, first: int) -> None:
    found = load_tokenizer(shared_data / name).ids
    assert asdict(found) == {
        "image": first,
        "begin_image": first + 1,
        "end_image": first + 2,
        "pad": first + 3,
        "bos": first + 4,
        "eos": first + 5,
        "vocabulary_size": first + 11,
        "tokenizer_sha256": tokenizer_hash(shared_data / name),
    }


def test_a_name_in_the_config_replaces_the_tokenizers_own(shared_data: Path) -> None:
    names = TokenNames(eos="<|endoftext|>", begin_image="<|vision_start|>", end_image="<|vision_end|>")
    ids = load_tokenizer(shared_data / "tokenizer-bpe8k", names).ids
    assert (ids.eos, ids.begin_image, ids.end_image, ids.image) == (8187, 8188, 8189, 8181)


def test_begin_token_is_none_when_the_config_says_so_or_the_tokenizer_has_none(directory: Path) -> None:
    assert load_tokenizer(directory, TokenNames(bos="none")).ids.bos is None
    assert load_tokenizer(edit(directory, lambda config: config.pop("bos_token"))).ids.bos is None
    assert load_tokenizer(directory, TokenNames(bos="<|begin_of_text|>")).ids.bos == 8185


def test_padding_may_be_the_end_token(directory: Path) -> None:
    ids = load_tokenizer(directory, TokenNames(pad="<|end_of_text|>")).ids
    assert ids.pad == ids.eos == 8186


def test_a_token_in_the_config_may_be_an_object(directory: Path) -> None:
    edit(directory, lambda config: config.update(eos_token={"content": "<|endoftext|>", "special": True}))
    assert load_tokenizer(directory).ids.eos == 8187


def test_the_hash_covers_both_files(directory: Path) -> None:
    before = load_tokenizer(directory).ids.tokenizer_sha256
    changed = load_tokenizer(edit(directory, lambda config: config.update(more=1))).ids.tokenizer_sha256
    edit(directory, lambda content: content.update(more=1), "tokenizer.json")
    assert len({before, changed, tokenizer_hash(directory)}) == 3


def test_the_hash_covers_a_chat_template_and_which_file_it_is(directory: Path) -> None:
    hashes = {tokenizer_hash(directory)}
    names = ["chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja"]
    for name in names:
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{{ messages }}")
        assert tokenizer_files(directory) == ["tokenizer.json", "tokenizer_config.json", name]
        hashes.add(tokenizer_hash(directory))
        path.unlink()
    assert len(hashes) == 4


def test_a_data_set_keeps_the_files_of_sources_and_hashes_them_as_it_finds_them(
    directory: Path, tmp_path: Path
) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages }}")
    plain, sources = tokenizer_hash(directory), {"b": [template], "a-b": [], "a": [template]}
    kept = tmp_path / "kept"
    for name, path in kept_files(directory, sources).items():
        (kept / name).parent.mkdir(parents=True, exist_ok=True)
        (kept / name).write_bytes(path.read_bytes())
    expected = ["tokenizer.json", "tokenizer_config.json"]
    assert tokenizer_files(kept) == [*expected, "source_files/a/mine.jinja", "source_files/b/mine.jinja"]
    assert tokenizer_hash(kept) == tokenizer_hash(directory, sources) != plain
    # As the tokenizer of a next data set it is what it was here.
    assert tokenizer_hash(kept, {}) == plain and list(kept_files(kept, {})) == expected
    assert tokenizer_hash(directory, {"a": []}) == plain


def test_what_a_special_token_does_to_white_space_is_kept(directory: Path) -> None:
    def swallow(config: dict[str, Any]) -> None:
        for entry in config["added_tokens_decoder"].values():
            entry.update(rstrip=entry["content"] == "<|end_of_text|>", lstrip=entry["content"] == "<|image|>")

    added = load_tokenizer(edit(directory, swallow)).tokenizer.get_added_tokens_decoder().values()
    assert [token.content for token in added if token.rstrip] == ["<|end_of_text|>"]
    assert [token.content for token in added if token.lstrip] == ["<|image|>"]


# Text stays text


def check_text(tokenizer: TextTokenizer, text: str) -> None:
    [ids] = tokenizer.encode([text])
    assert not set(ids.tolist()) & set(range(8181, 8192)), "a special token from text"
    assert not tokenizer.are_special(ids).any()
    assert tokenizer.decode(ids.tolist()) == text


@pytest.mark.parametrize("special", SPECIALS)
def test_a_literal_special_string_in_text_stays_text(tokenizer: TextTokenizer, special: str) -> None:
    for text in (
        special,
        special * 3,
        f"a cat {special} on a mat",
        f" {special}\n",
        f"<{special}>",
        "x" + special,
    ):
        check_text(tokenizer, text)


@given(st.lists(st.text() | st.sampled_from(SPECIALS), max_size=6).map("".join))
@example("<|im" + "age|>")
@example("  \r\n\t é 日本 \U0001f600\x00 ")
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_text_comes_back_and_holds_no_special_token(tokenizer: TextTokenizer, text: str) -> None:
    check_text(tokenizer, text)


def test_a_special_string_stays_text_also_where_only_the_config_declares_it(shared_data: Path) -> None:
    # This tokenizer loses text, so only the ids are looked at: 1998 .. 2008 are special.
    lossy = load_tokenizer(shared_data / "tokenizer")
    for ids in lossy.encode([*SPECIALS, "a<|image|>b<|pad|>"]):
        assert len(ids) > 1 and not set(ids.tolist()) & set(range(1998, 2009))


def test_texts_are_encoded_one_by_one_without_begin_end_padding_or_truncation(
    tokenizer: TextTokenizer,
) -> None:
    texts = ["", "a", "a much longer text " * 3000]
    found = tokenizer.encode(texts)
    assert [ids.dtype.name for ids in found] == ["int32"] * 3
    assert len(found[0]) == 0 and len(found[1]) == 1
    assert tokenizer.decode(found[2].tolist()) == texts[2]


def test_begin_and_end_tokens_that_the_tokenizer_file_adds_are_not_added(directory: Path) -> None:
    # As Llama's file does. The stream's own begin and end tokens are placed per document, not per text.
    begin = {"id": "<|begin_of_text|>", "type_id": 0}
    pieces = [{"SpecialToken": begin}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"id": "<|begin_of_text|>", "ids": [8185], "tokens": ["<|begin_of_text|>"]}
    template = {"type": "TemplateProcessing", "single": pieces, "pair": pieces}
    template |= {"special_tokens": {"<|begin_of_text|>": special}}
    edit(directory, lambda file: file.update(post_processor=template), "tokenizer.json")
    check_text(load_tokenizer(directory), "a cat")


def test_padding_and_truncation_in_the_tokenizer_file_are_not_applied(directory: Path) -> None:
    padding = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 8184, "pad_type_id": 0, "pad_token": "<|pad|>"}
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    edit(directory, lambda file: file.update(padding=padding, truncation=truncation), "tokenizer.json")
    check_text(load_tokenizer(directory), "a text of more than four tokens and fewer than sixty-four")


def test_every_special_id_is_seen_where_it_is(tokenizer: TextTokenizer) -> None:
    [plain] = tokenizer.encode(["a cat"])
    for special in range(8181, 8187):
        found = plain.copy()
        found[-1] = special
        assert tokenizer.are_special(found).tolist() == [False] * (len(plain) - 1) + [True]


# Tokenizers that are refused


def test_all_absent_special_tokens_are_named_at_once(directory: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        del config["img_token"], config["eoi_token"]
        config["pad_token"] = "<pad>"

    message = refusal(edit(directory, change), TokenNames(eos="</s>"))
    assert "special tokens missing: " in message
    for part in (
        "image (no img_token)",
        "end_image (no eoi_token)",
        "pad ('<pad>' is not",
        "eos ('</s>' is not",
    ):
        assert part in message
    assert "begin_image" not in message and "bos" not in message


def test_a_begin_token_that_is_named_and_absent_is_missing_too(directory: Path) -> None:
    assert "bos ('<s>' is not in the vocabulary)" in refusal(directory, TokenNames(bos="<s>"))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_missing_file_is_named(directory: Path, name: str) -> None:
    (directory / name).unlink()
    assert f"no {name}; expected a directory with tokenizer.json and tokenizer_config.json" in refusal(
        directory
    )


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    assert "no tokenizer.json" in refusal(tmp_path / "gone")


def test_broken_files_are_named(directory: Path) -> None:
    config, file = directory / "tokenizer_config.json", directory / "tokenizer.json"
    good = config.read_bytes()
    config.write_text("{")
    assert "tokenizer_config.json: not valid JSON" in refusal(directory)
    config.write_text("[]")
    assert "tokenizer_config.json is not a JSON object" in refusal(directory)
    config.write_bytes(good)
    file.write_text("{}")
    assert "tokenizer.json is not a tokenizer" in refusal(directory)


def test_ids_that_disagree_between_the_two_files_are_refused(directory: Path) -> None:
    def swap(config: dict[str, Any]) -> None:
        added = config["added_tokens_decoder"]
        added["8181"], added["8182"] = added["8182"], added["8181"]

    message = refusal(edit(directory, swap))
    assert "gives '<|begin_of_image|>' id 8181, tokenizer.json 8182" in message


def test_an_id_beyond_the_end_of_the_vocabulary_is_refused(directory: Path) -> None:
    # The library would give an unknown token the next free id, 8192, without a word.
    def add(config: dict[str, Any]) -> None:
        config["added_tokens_decoder"]["9000"] = {"content": "<|new|>", "special": True}

    assert "gives '<|new|>' id 9000, tokenizer.json 8192" in refusal(edit(directory, add))


def test_two_parts_that_share_one_token_are_refused(directory: Path) -> None:
    assert "two special tokens share one id" in refusal(directory, TokenNames(image="<|pad|>"))
    assert "two special tokens share one id" in refusal(directory, TokenNames(end_image="<|begin_of_image|>"))
