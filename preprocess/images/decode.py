"""Encoded picture -> its pixels as stored: all of them, or fewer where a JPEG is much larger than what it becomes.

JPEG is decoded by libjpeg-turbo straight into an array; everything else, and every JPEG that libjpeg-turbo says
the least word about, by Pillow, whose verdict on damage is the one that counts.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import BinaryIO

import numpy as np
import simplejpeg
from PIL import Image, ImageChops, TiffImagePlugin

from preprocess.config import ImageLimits
from preprocess.images.colour import Pixels, Transform, opaque, scale_clear_colour
from preprocess.images.errors import pillow_limit, quiet_stderr, reject_as

# Made opaque at a time: every step of that has a copy, of 16 MB with this.
BAND_PIXELS = 4 << 20

# A JPEG is decoded to 1/2, 1/4 or 1/8 of its size if this many times the target remains on both sides
# (benchmarks/images.py: what other margins do to the result). Those are the sizes with vectorized code.
MARGIN = 1.5
_SCALES = (8, 4, 2)


def decode_pixels(
    picture: Image.Image,
    file: BinaryIO,
    data: bytes | memoryview,
    *,
    target: tuple[int, int] | None,
    limits: ImageLimits,
    background: tuple[int, int, int],
    profile: Transform | None,
) -> tuple[Pixels, int]:
    """RGB uint8 [H, W, 3] in the order of the file, and the divisor of its size: 1, 2, 4 or 8.

    file, data: the same bytes, as Pillow and as libjpeg-turbo take them.
    target: (height, width) that the pixels are going to be resized to, which allows fewer pixels; None for all.

    Raises:
        ImageError: the pixels cannot be decoded, all of them.
    """
    if picture.format in ("JPEG", "MPO") and picture.mode in ("RGB", "L"):
        width, height = picture.size
        scale = 1 if target is None else scale_of((height, width), target)
        if (pixels_hwc := _turbo(data, (height, width), scale)) is not None:
            return pixels_hwc, scale
    quiet = quiet_stderr() if picture.format == "TIFF" else nullcontext()
    with reject_as("image_corrupt", file), pillow_limit(limits.max_pixels), quiet:
        scale_clear_colour(picture)
        picture.load()
        # Pillow takes every CMYK JPEG for one of Adobe's, which hold the paper that shows instead of the ink.
        negative = picture.format == "JPEG" and picture.mode == "CMYK" and "adobe" not in picture.info
        loaded = ImageChops.invert(picture) if negative else picture
        pixels_hwc = _in_bands(loaded, background, profile)
    return (255 - pixels_hwc if _is_white_zero(picture) else pixels_hwc), 1


def _is_white_zero(picture: Image.Image) -> bool:
    """Whether a TIFF's grey runs from white to black: of 16 bits, Pillow gives it as it is."""
    if not isinstance(picture, TiffImagePlugin.TiffImageFile) or not picture.mode.startswith("I;16"):
        return False
    return picture.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0


def _turbo(data: bytes | memoryview, size: tuple[int, int], scale: int) -> Pixels | None:
    """RGB uint8 [H / scale, W / scale, 3], rounded up; None if the decoder has anything to object, be it a warning."""
    least = (-(-size[0] // scale), -(-size[1] // scale))
    try:
        # The smallest of the decoder's sizes that is no smaller: exactly this.
        pixels_hwc = simplejpeg.decode_jpeg(data, "RGB", min_height=least[0], min_width=least[1])
    except ValueError:
        return None
    return pixels_hwc if pixels_hwc.shape[:2] == least else None


def scale_of(size: tuple[int, int], target: tuple[int, int]) -> int:
    """Divisor of a JPEG's size to decode it to: 8, 4, 2 or 1."""
    return next(
        (s for s in _SCALES if all(a >= s * MARGIN * b for a, b in zip(size, target, strict=True))), 1
    )


def _in_bands(picture: Image.Image, background: tuple[int, int, int], profile: Transform | None) -> Pixels:
    """Band by band, so that only the picture as decoded and the result are whole."""
    width, height = picture.size
    if width * height <= BAND_PIXELS:
        return opaque(picture, background, profile)
    rows = max(1, BAND_PIXELS // width)
    out_hwc = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        band = picture.crop((0, top, width, bottom))
        out_hwc[top:bottom] = opaque(band, background, profile)
    return out_hwc
