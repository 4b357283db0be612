"""webdataset tars: the members of one key (path up to the first dot of the name) are one sample.

    000000001.jpg  000000001.txt  000000001.json   ->   [image, caption]
    000000002.mp4  000000002.txt                   ->   [video, caption]

The scan walks the tar headers and reads the captions; a picture's place in the tar is its own, and the pack
reads it from there. Tars packed with gzip or zstd have no places: they are read through, and their pictures are
copied beside the index (`tars`).
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from preprocess.faults import NO_ITEM, begin
from preprocess.inputs import Local, Span, expand_paths, local_copy, read_range
from preprocess.samples import IMAGE, VIDEO, Media, Missing, Place, RawSample, Reject
from preprocess.sources.base import SourceConfig, SourceContext
from preprocess.sources.prompt import IMAGE_THEN_CAPTION, check_prompts, fill_prompt, prompt_of
from preprocess.sources.tars import (
    WINDOW_KEYS,
    Group,
    Member,
    compression_of,
    walk_plain,
    walk_stream,
)
from shared.remote import shown

IMAGE_EXTENSIONS = frozenset(
    "jpg jpeg jpe jfif mpo png apng webp gif bmp tif tiff avif jp2 j2k ppm pgm ico heic heif".split()
)
VIDEO_EXTENSIONS = frozenset("mp4 m4v mov webm mkv avi".split())

# A text takes 120 times its size while it is tokenized (measured with a BPE of 8192): half a gigabyte.
MAX_CAPTION_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class WebDatasetConfig(SourceConfig):
    """Captioned images and videos in tars."""

    format: Literal["webdataset"] = "webdataset"
    # "txt": the .txt member. "json:FIELD": a field of the .json member.
    caption: str = "txt"
    # What a sample looks like, {image} (picture or video) and {caption} once each; other words are learned if told so.
    prompt: str = IMAGE_THEN_CAPTION
    # Instead of `prompt`: each sample has one of these, by a hash of its key.
    prompts: tuple[str, ...] = ()
    learn_prompt: bool = False
    # A caption longer than a pack is no caption, and cut off from its picture it teaches nothing: too_long stays
    # "reject" unless the captions are documents.

    def __post_init__(self) -> None:
        SourceConfig.__post_init__(self)
        check_prompts(self.prompt, self.prompts)
        if self.caption != "txt" and not (self.caption.startswith("json:") and len(self.caption) > 5):
            raise ValueError(f'caption must be "txt" or "json:FIELD", got {self.caption!r}')


class WebDataset:
    """A source of captioned images and videos in tars (USTAR, PAX, GNU), plain or packed with gzip or zstd."""

    def __init__(self, config: WebDatasetConfig, context: SourceContext) -> None:
        self._name, self._paths = context.name, config.paths
        self._max_bytes = {
            **dict.fromkeys(IMAGE_EXTENSIONS, context.max_media_bytes),
            **dict.fromkeys(VIDEO_EXTENSIONS, context.max_video_bytes),
        }
        self._prompt, self._prompts, self._learn_prompt = config.prompt, config.prompts, config.learn_prompt
        self._field = config.caption.partition(":")[2]
        self._caption = "json" if self._field else "txt"

    def units(self) -> list[str]:
        return expand_paths(self._name, self._paths)

    def scan(self, unit: str) -> Iterator[RawSample | Reject]:
        rest = f"{os.path.basename(shown(unit))}#rest"
        if codec := compression_of(unit):
            for group in walk_stream(unit, codec, self._wanted):
                if isinstance(group, Group):
                    yield self._sample(unit, None, group)
                else:
                    yield self._reject(rest, "archive_damaged", group)
            return
        begin(NO_ITEM)  # a distant file takes as long as it takes
        file = local_copy(unit)
        groups, damage = walk_plain(unit, file)
        for group in groups:
            yield self._sample(unit, file, group)
        if damage:
            yield self._reject(rest, "archive_damaged", damage)

    def _wanted(self, extension: str) -> int:
        """Up to which size a member of a stream is kept."""
        return self._max_bytes.get(extension, MAX_CAPTION_BYTES if extension == self._caption else -1)

    def _sample(self, unit: str, file: Local | None, group: Group) -> RawSample | Reject:
        """`file`: the content of `unit` on this machine; None for a stream, whose members carry theirs."""
        if group.fault == "repeated":
            return self._reject(group.key, "duplicate_key", "the tar holds this key twice; the first is used")
        images = [(name, member) for name, member in group.members.items() if name in self._max_bytes]
        caption = group.members.get(self._caption)
        if group.fault == "late":
            reason = "duplicate_key" if images and caption else "members_apart"
            return self._reject(
                group.key, reason, f"more than {WINDOW_KEYS} keys behind the first of its key"
            )
        if len(images) != 1:
            # A caption says nothing of which picture it belongs to.
            reason = "several_images" if images else "no_image"
            return self._reject(group.key, reason, f"members: {', '.join(group.members) or 'none'}")
        if caption is None:
            return self._reject(group.key, "no_caption", f"no .{self._caption} member")
        if caption.size > MAX_CAPTION_BYTES:
            detail = f"{caption.size} bytes, limit {MAX_CAPTION_BYTES}"
            return self._reject(group.key, "caption_too_many_bytes", detail)
        data = caption.data if file is None else read_range(file, caption.offset, caption.size)
        assert data is not None, "a caption below the limit is kept"
        try:
            text = self._text(data)
        except UnicodeError as error:
            return self._reject(group.key, "caption_not_utf8", str(error))
        except (ValueError, RecursionError) as error:  # ValueError: also an integer of too many digits
            return self._reject(group.key, "json_invalid", str(error))
        except KeyError as error:
            return self._reject(group.key, "no_caption", f"no text field {error} in the .json member")
        if not text.strip():
            return self._reject(group.key, "caption_empty", f"{caption.size} bytes of white space")
        picture = self._media(unit, file, *images[0])
        prompt = prompt_of(group.key, self._prompt, self._prompts)
        segments = fill_prompt(prompt, picture, text, learn_prompt=self._learn_prompt)
        return RawSample(group.key, segments)

    def _media(self, unit: str, file: Local | None, extension: str, member: Member) -> Media | Missing:
        kind = VIDEO if extension in VIDEO_EXTENSIONS else IMAGE
        if file is not None:
            place = Place(unit, member.offset, member.size)
            return Media(kind, Span(file, member.offset, member.size), place)
        if member.data is None:
            detail = f"{member.size} bytes, limit {self._max_bytes[extension]}"
            return Missing(f"{'video' if kind == VIDEO else 'image'}_too_many_bytes", detail)
        return Media(kind, io.BytesIO(member.data), None)

    def _text(self, data: bytes) -> str:
        """The caption in a member's bytes, without a byte order mark and outer white space."""
        text = data.decode("utf-8-sig")
        if self._field:
            record = json.loads(text)
            value = record.get(self._field) if isinstance(record, dict) else None
            if not isinstance(value, str):
                raise KeyError(self._field)
            text = value
            # JSON escapes can spell lone surrogates, which no UTF-8 text holds.
            text.encode("utf-8")
        return text.strip()

    def _reject(self, key: str, reason: str, detail: str) -> Reject:
        return Reject(self._name, key, reason, detail)
