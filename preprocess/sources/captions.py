"""Captioned pictures or videos in a table: a column of them and a column of captions.

CSV, TSV, JSON lines, Parquet, Arrow, or a folder that `datasets.save_to_disk` wrote; a picture is whatever
`pictures.picture` knows: bytes, a path, both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from preprocess.samples import RawSample, Reject
from preprocess.sources.base import SourceConfig, SourceContext
from preprocess.sources.pictures import picture, picture_root, video
from preprocess.sources.prompt import IMAGE_THEN_CAPTION, check_prompts, fill_prompt, prompt_of
from preprocess.sources.records import Value, keyed_records
from preprocess.sources.saved import expand_tables


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionsConfig(SourceConfig):
    """Captioned pictures or videos in tables."""

    format: Literal["captions"] = "captions"
    # Columns of picture, caption and key; without a key column the key is NAME#ROW.
    image: str = "image"
    caption: str = "caption"
    key: str = ""
    # Column of videos; where it is named, there is no column of pictures. {image} of the prompt is the video.
    video: str = ""
    # Where paths begin: a folder, absolute or relative to the table's own. No path leads out of it.
    image_root: str = ""
    # What a sample looks like, {image} and {caption} once each; its own words are learned only if told so.
    prompt: str = IMAGE_THEN_CAPTION
    # Instead of `prompt`: each sample has one of these, by a hash of its key.
    prompts: tuple[str, ...] = ()
    learn_prompt: bool = False

    def __post_init__(self) -> None:
        SourceConfig.__post_init__(self)
        check_prompts(self.prompt, self.prompts)
        for name in ("image", "caption"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; name the column")


class Captions:
    """A source of captioned pictures or videos in tables."""

    def __init__(self, config: CaptionsConfig, context: SourceContext) -> None:
        self._config, self._name = config, context.name
        self._most_page = context.max_page_bytes

    def units(self) -> list[str]:
        return expand_tables(self._name, self._config.paths)

    def scan(self, unit: str) -> Iterator[RawSample | Reject]:
        config = self._config
        root = picture_root(unit, config.image_root)
        columns = [name for name in (config.video or config.image, config.caption, config.key) if name]
        for row in keyed_records(self._name, unit, columns, config.key, self._most_page):
            yield row if isinstance(row, Reject) else self._sample(*row, root)

    def _sample(self, key: str, value: Value, root: str) -> RawSample | Reject:
        config = self._config
        caption = value.get(config.caption)
        if not isinstance(caption, str):
            kind = "null or not there" if caption is None else type(caption).__name__
            return Reject(self._name, key, "no_caption", f"{config.caption!r} is {kind}, expected text")
        if not caption.strip():
            return Reject(self._name, key, "caption_empty", f"{len(caption)} characters of white space")
        named = value.get(config.video or config.image)
        image = video(named, root) if config.video else picture(named, root)
        prompt = prompt_of(key, config.prompt, config.prompts)
        segments = fill_prompt(prompt, image, caption.strip(), learn_prompt=config.learn_prompt)
        return RawSample(key, segments)
