"""Where the picture, its caption and a prompt stand in a sample.

"{image}{caption}"                           the picture, then its caption
"Describe the picture.\\n{image}\\n{caption}"  a prompt before the picture, a line break behind it

A source with several takes one by a hash of the sample's key, so that nothing is learned of one wording alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import xxhash

from preprocess.samples import Media, Missing, Segment, Text

IMAGE_THEN_CAPTION = "{image}{caption}"


def check_prompts(prompt: str, prompts: Sequence[str]) -> None:
    """Raises: ValueError: picture or caption have no place in one, or several; or both settings are set."""
    for text in (prompt, *prompts):
        for mark in ("{image}", "{caption}"):
            if text.count(mark) != 1:
                raise ValueError(f"prompt must hold {mark} once, got {text!r}")
    if prompts and prompt != IMAGE_THEN_CAPTION:
        raise ValueError(f"prompt {prompt!r} and prompts are two answers to one question; set one")


def prompt_of(key: str, prompt: str, prompts: Sequence[str]) -> str:
    """The prompt of the sample `key`: `prompt`, or one of several."""
    # With a seed of its own: the hash without one says which samples are for validation.
    return prompts[xxhash.xxh3_64_intdigest(key.encode(), seed=1) % len(prompts)] if prompts else prompt


def fill_prompt(
    prompt: str, image: Media | Missing, caption: str, *, learn_prompt: bool
) -> tuple[Segment, ...]:
    """The sample's segments. Without `learn_prompt` only the caption is learned."""
    learn_all = (
        learn_prompt or prompt == IMAGE_THEN_CAPTION
    )  # plain text is tokenized faster than marked text
    segments: list[Segment] = []
    for number, side in enumerate(prompt.split("{image}")):
        if number:
            segments.append(image)
        before, mark, behind = side.partition("{caption}")
        text = before + (caption if mark else "") + behind
        if not text:
            continue
        learned = ((len(before), len(before) + len(caption)),) if mark else ()
        segments.append(Text(text, None if learn_all else learned))
    return tuple(segments)
