"""A picture as tables and JSON name it: its bytes, a path, both, or an address that has not been fetched.

    b"..."                        the encoded file               "images/a.jpg"          a path below `root`
    {"bytes": .., "path": ..}     either of them                 "data:image/png;base64,..", or base64 alone
    {"url": ..}                   what a URL may be              "https://.."            not fetched

A file is read from where it lies; bytes out of a table have no place, and the scan copies them.
"""

from __future__ import annotations

import base64
import binascii
import errno
import io
import os
import posixpath
import re
import stat
from dataclasses import replace
from typing import Any, cast

from preprocess.inputs import Span
from preprocess.samples import IMAGE, OVER_MAX_IMAGES, VIDEO, Media, Missing, Place
from shared import remote
from shared.remote import is_remote, without_query

# A name in a directory has at most 255 characters, and that of a picture a dot, which base64 has not.
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{256,}={0,2}\s*")
# What says it in an object, in this order.
NAMED_BY = ("bytes", "path", "url")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_address(text: str) -> bool:
    """Whether text is the address of something on the web."""
    return text[:7].lower() in ("http://", "https:/")


def check_max_images(limit: int, bad_media: str) -> None:
    """Of a source whose config has `max_images_per_document`.

    Raises:
        ValueError: it means nothing.
    """
    if limit < 0:
        raise ValueError(f"max_images_per_document must be at least 0, got {limit}")
    if limit and bad_media == "reject":
        raise ValueError('max_images_per_document drops pictures: it needs bad_media = "drop"')


def over_max_images(place: int, limit: int) -> Missing | None:
    """What stands for picture `place` of a document, counted from 0, if that is beyond `max_images_per_document`."""
    return Missing(OVER_MAX_IMAGES, f"image {place + 1}, limit {limit}") if 0 < limit <= place else None


def picture_root(unit: str, image_root: str) -> str:
    """Where relative paths in a raw file begin: `image_root`, which may be relative to the file's own folder."""
    return (
        image_root
        if is_remote(image_root)
        else os.path.join(os.path.dirname(without_query(unit)), image_root)
    )


def picture(value: Any, root: str) -> Media | Missing:
    """The picture that a value of a record means; relative paths are below `root`, and none leads out of it.

    Links in `root` are followed: who put them there, meant it.
    """
    if isinstance(value, dict):
        fields = cast(dict[str, Any], value)
        found = next((fields[name] for name in NAMED_BY if fields.get(name) is not None), None)
        return _malformed(found) if isinstance(found, dict) else picture(found, root)
    if value is None or value == "":
        return Missing("image_missing", "null or empty")
    if isinstance(value, bytes):
        return Media(IMAGE, cast(Any, io.BytesIO(value)), None)
    return _named(value, root) if isinstance(value, str) else _malformed(value)


def video(value: Any, root: str) -> Media | Missing:
    """The video that a value means, in the ways that a picture is named."""
    found = picture(value, root)
    if isinstance(found, Missing):
        return replace(found, reason=found.reason.replace("image_", "video_", 1))
    return replace(found, kind=VIDEO)


def _malformed(value: object) -> Missing:
    return Missing("image_malformed", f"expected bytes or a path, got {type(value).__name__}")


def _named(text: str, root: str) -> Media | Missing:
    if text[:5].lower() == "data:":
        head, comma, data = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            return Missing("image_malformed", f"a data: URL without base64: {head[:60]!r}")
        return _decoded(data)
    if is_address(text):
        return Missing(
            "image_not_fetched", f"{text[:200]}: `python -m preprocess fetch` stores pictures, no videos"
        )
    if _BASE64.fullmatch(text):
        return _decoded(text)
    if text.startswith("file://"):
        return _file(text.removeprefix("file://"), root)
    if is_remote(root):
        return _object(text, root)
    if _SCHEME.match(text):
        return Missing("image_not_fetched", f"{text[:200]} is in a store; set image_root to a folder of it")
    return _file(text, root)


def _decoded(text: str) -> Media | Missing:
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        return Missing("image_malformed", f"not base64: {error}")
    return Media(IMAGE, cast(Any, io.BytesIO(data)), None)


def _object(name: str, root: str) -> Media | Missing:
    """A picture in a store: one request says its size, others read its header."""
    root = root.rstrip("/")
    scheme, _, folder = root.partition("://")
    path = posixpath.normpath(posixpath.join(folder, name.removeprefix(f"{root}/")))
    if not path.startswith(f"{folder}/"):
        return _outside(name, root)
    uri = f"{scheme}://{path}"
    size = remote.size_of(uri)  # refused access is an error, and no missing picture
    if size is None:
        return Missing("image_missing", f"no object {remote.shown(uri)}")
    return Media(IMAGE, Span(uri, 0, size), Place(uri, 0, size))


def _outside(name: str, root: str) -> Missing:
    return Missing(
        "image_outside_root", f"{name[:200]!r} is not below {root}; set image_root to a folder above"
    )


def _file(name: str, root: str) -> Media | Missing:
    root = os.path.abspath(root)
    path = os.path.normpath(os.path.join(root, name))
    if os.path.commonpath((root, path)) != root:
        return _outside(name, root)
    try:
        state = os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name no file can have
        return Missing("image_missing", f"no file {path[-200:]!r}")
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return Missing("image_missing", f"no file has so long a name: {name[:60]!r}")
        raise
    if not stat.S_ISREG(state.st_mode):
        return Missing("image_missing", f"{path[-200:]!r} is no file")
    return Media(IMAGE, Span(path, 0, state.st_size), Place(path, 0, state.st_size))
