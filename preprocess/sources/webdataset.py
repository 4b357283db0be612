"""webdataset tars: the members of one key (path up to the first dot of the name) are one sample.

    000000001.jpg  000000001.txt  000000001.json   ->   [image, caption]

The scan walks the tar headers and reads the captions; a picture's place in the tar is its own, and the pack
reads it from there.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from preprocess.inputs import Span, expand_paths, open_cached, read_range
from preprocess.samples import IMAGE, Media, Place, RawSample, Reject
from preprocess.sources.base import BadFileError, SourceConfig, SourceContext
from preprocess.sources.prompt import IMAGE_THEN_CAPTION, check_prompt, fill_prompt

IMAGE_EXTENSIONS = frozenset(
    "jpg jpeg jpe jfif mpo png apng webp gif bmp tif tiff avif jp2 j2k ppm pgm ico heic heif".split()
)

# A text takes 120 times its size while it is tokenized (measured with a BPE of 8192): half a gigabyte.
MAX_CAPTION_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class WebDatasetConfig(SourceConfig):
    """Captioned images in tars."""

    format: Literal["webdataset"] = "webdataset"
    # "txt": the .txt member. "json:FIELD": a field of the .json member.
    caption: str = "txt"
    # What a sample looks like, {image} and {caption} once each; its own words are learned only if told so.
    prompt: str = IMAGE_THEN_CAPTION
    learn_prompt: bool = False
    # A caption longer than a pack is no caption, and cut off from its picture it teaches nothing: too_long stays
    # "reject" unless the captions are documents.

    def __post_init__(self) -> None:
        SourceConfig.__post_init__(self)
        check_prompt(self.prompt)
        if self.caption != "txt" and not (self.caption.startswith("json:") and len(self.caption) > 5):
            raise ValueError(f'caption must be "txt" or "json:FIELD", got {self.caption!r}')


@dataclass(slots=True)
class _Group:
    """The members of one key, by lower-case extension: (offset, size)."""

    key: str
    repeated: bool
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


class WebDataset:
    """A source of captioned images in plain tars (USTAR, PAX, GNU)."""

    def __init__(self, config: WebDatasetConfig, context: SourceContext) -> None:
        self._name, self._paths = context.name, config.paths
        self._prompt, self._learn_prompt = config.prompt, config.learn_prompt
        self._field = config.caption.partition(":")[2]
        self._caption = "json" if self._field else "txt"

    def units(self) -> list[str]:
        return expand_paths(self._name, self._paths)

    def scan(self, unit: str) -> Iterator[RawSample | Reject]:
        groups, damage = _read_headers(unit)
        for group in groups:
            yield self._sample(unit, group)
        if damage:
            yield self._reject(f"{os.path.basename(unit)}#rest", "archive_damaged", damage)

    def _sample(self, unit: str, group: _Group) -> RawSample | Reject:
        if group.repeated:
            return self._reject(group.key, "duplicate_key", "the tar holds this key twice; the first is used")
        images = [place for name, place in group.members.items() if name in IMAGE_EXTENSIONS]
        if len(images) != 1:
            # A caption says nothing of which picture it belongs to.
            reason = "several_images" if images else "no_image"
            return self._reject(group.key, reason, f"members: {', '.join(group.members) or 'none'}")
        image = images[0]
        caption = group.members.get(self._caption)
        if caption is None:
            return self._reject(group.key, "no_caption", f"no .{self._caption} member")
        if caption[1] > MAX_CAPTION_BYTES:
            detail = f"{caption[1]} bytes, limit {MAX_CAPTION_BYTES}"
            return self._reject(group.key, "caption_too_many_bytes", detail)
        data = read_range(unit, *caption)
        try:
            text = self._text(data)
        except UnicodeError as error:
            return self._reject(group.key, "caption_not_utf8", str(error))
        except (ValueError, RecursionError) as error:  # ValueError: also an integer of too many digits
            return self._reject(group.key, "json_invalid", str(error))
        except KeyError as error:
            return self._reject(group.key, "no_caption", f"no text field {error} in the .json member")
        if not text.strip():
            return self._reject(group.key, "caption_empty", f"{caption[1]} bytes of white space")
        picture = Media(IMAGE, Span(unit, *image), Place(unit, *image))
        segments = fill_prompt(self._prompt, picture, text, learn_prompt=self._learn_prompt)
        return RawSample(group.key, segments)

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


def _read_headers(unit: str) -> tuple[list[_Group], str]:
    """Members grouped by key in order of first appearance, and what stopped the walk ("" at a proper end).

    Raises:
        BadFileError: the file is not a plain tar at all.
        OSError: it cannot be read now; the executor tries again.
    """
    groups: dict[str, _Group] = {}
    repeats: list[_Group] = []
    size = os.path.getsize(unit)
    try:
        with tarfile.open(unit, "r:") as tar:
            try:
                for member in tar:
                    if member.size < 0:  # a header that leads back to itself would never end
                        return [*groups.values(), *repeats], f"{member.name} has a size of {member.size}"
                    if member.isfile() and member.offset_data + member.size > size:
                        return [*groups.values(), *repeats], f"{member.name} is cut off at byte {size}"
                    _add_member(groups, repeats, member)
                damage = _what_follows(unit, tar.offset)
            except (tarfile.TarError, ValueError, EOFError) as error:
                damage = f"{type(error).__name__}: {error}"
    except tarfile.TarError as error:
        raise BadFileError(
            "file_unreadable",
            f"{unit}: not a readable tar ({error}); compressed tars cannot be read by offset, unpack them",
        ) from None
    return [*groups.values(), *repeats], damage


def _what_follows(unit: str, offset: int) -> str:
    """What is lost behind the archive's end at `offset`; "" when that is nothing.

    tarfile takes a header that it cannot read for the end, once there was a good one, and stops at a block of
    zeros, though another archive may have been appended to it. Other bytes behind the zeros are no members.
    """
    file, block = open_cached(unit).fileno(), b""
    position = offset
    while chunk := os.pread(file, 1 << 20, position):
        zeros = len(chunk) - len(chunk.lstrip(b"\0"))
        if zeros < len(chunk):
            position += zeros // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
            block = os.pread(file, tarfile.BLOCKSIZE, position)
            break
        position += len(chunk)
    if not block:
        return ""
    if position == offset:
        return f"no readable header at byte {offset}"
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return ""
    return f"another archive follows at byte {position}; unpack the tar and pack it again as one"


def _add_member(groups: dict[str, _Group], repeats: list[_Group], member: tarfile.TarInfo) -> None:
    folder, _, name = member.name.rpartition("/")
    stem, _, extension = name.partition(".")
    if not member.isfile() or not stem:  # links, folders, and hidden files such as ._x.jpg
        return
    # Names are bytes; keys are text in every table that follows.
    key = (f"{folder}/{stem}" if folder else stem).encode("utf-8", "backslashreplace").decode()
    group = groups.setdefault(key, _Group(key, repeated=False))
    if extension.lower() in group.members:
        if not repeats or repeats[-1].key != key or extension.lower() in repeats[-1].members:
            repeats.append(_Group(key, repeated=True))
        group = repeats[-1]
    group.members[extension.lower()] = (member.offset_data, member.size)
