"""The border between one picture's bytes and the job: whatever a decoder does about bad bytes is one reject."""

from __future__ import annotations

import io
import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError


class ImageError(ValueError):
    """A picture that is rejected: `reason` is counted, the message is the detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@contextmanager
def reject_as(reason: str, file: BinaryIO) -> Generator[None, None, None]:
    """Decoders raise anything on broken input: all of it becomes `ImageError(reason)`.

    What is no fault of the bytes goes on to the executor, which tries again: a shortage of memory, and an error
    of the operating system, which has a number.
    """
    try:
        yield
    except (MemoryError, ImageError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if isinstance(error, Image.DecompressionBombError):
            reason = "image_too_many_pixels"
        num_bytes = file.seek(0, io.SEEK_END)
        file.seek(0)
        first = file.read(8).hex()
        unknown = isinstance(error, UnidentifiedImageError)
        detail = str(error) if unknown else f"{type(error).__name__}: {error}"
        raise ImageError(reason, f"{detail[:120]} ({num_bytes} bytes, first {first})") from None


@contextmanager
def pillow_limit(max_pixels: int) -> Generator[None, None, None]:
    """Pillow's own limit, for sizes it meets inside a file: a canvas, a tile, a frame. It refuses from twice on."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


@contextmanager
def quiet_stderr() -> Generator[None, None, None]:
    """libtiff writes hundreds of lines about one bad file past Python, and Pillow does not let it be told not to."""
    try:
        saved = os.dup(2)
    except OSError:  # closed by who started us: nothing to silence
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
