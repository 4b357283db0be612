"""Where the picture, its caption and a prompt stand in a sample.

"{image}{caption}"                           the picture, then its caption
"Describe the picture.\\n{image}\\n{caption}"  a prompt before the picture, a line break behind it
"""

from __future__ import annotations

from preprocess.samples import Media, Missing, Segment, Text

IMAGE_THEN_CAPTION = "{image}{caption}"


def check_prompt(prompt: str) -> None:
    """Raises: ValueError: picture or caption have no place in it, or several."""
    for mark in ("{image}", "{caption}"):
        if prompt.count(mark) != 1:
            raise ValueError(f"prompt must hold {mark} once, got {prompt!r}")


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
