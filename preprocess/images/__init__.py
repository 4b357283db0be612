"""Encoded picture -> RGB at its patch grid. The scan reads headers only; the pack decodes once and copies once.

    header  size as displayed, every limit, no pixel decoded
    decode  pixels as stored, at full size or, of large JPEGs, at a half, a quarter or an eighth of it
    resize  to the patch grid
    colour  palettes, 16 bits, inks and transparency before the resize; embedded profiles of RGB and grey after it

No size is taken on trust: both passes hold it against the limits before a pixel is decoded.

Both passes see a picture as a viewer shows it: EXIF orientation applied, first frame of an animation, alpha over
the background, 16-bit grey scaled to 8 bits, colours as their profile means them.
"""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt

from preprocess.config import ImageConfig, ImageLimits
from preprocess.images.colour import follows_early, profile_of, to_srgb
from preprocess.images.decode import decode_pixels
from preprocess.images.errors import ImageError, reject_as
from preprocess.images.header import Header, open_picture, read_header
from preprocess.images.memory import LARGE_PIXELS, give_back
from preprocess.images.resize import resize
from shared.geometry import Geometry

__all__ = ["Header", "ImageError", "load_image", "read_header", "resize"]


def load_image(
    data: bytes | memoryview,
    *,
    size: tuple[int, int],
    grid: tuple[int, int],
    geometry: Geometry,
    limits: ImageLimits,
    config: ImageConfig,
) -> npt.NDArray[np.uint8]:
    """uint8 [h * p, w * p, 3], ready for `patchify`.

    Args:
        size: (height, width) as displayed, which the scan found in the header.
        grid: (h, w), patches.

    Raises:
        ImageError: beyond a limit, not of that size, or the pixels cannot be decoded, all of them.
    """
    try:
        return _load(data, size, grid, geometry, limits, config)
    finally:
        if size[0] * size[1] >= LARGE_PIXELS:
            give_back()


def _load(
    data: bytes | memoryview,
    size: tuple[int, int],
    grid: tuple[int, int],
    geometry: Geometry,
    limits: ImageLimits,
    config: ImageConfig,
) -> npt.NDArray[np.uint8]:
    file = io.BytesIO(data)
    picture, orientation = open_picture(file, limits)
    turned = orientation >= 5
    found = picture.size if turned else picture.size[::-1]
    if found != size:
        raise ImageError(
            "image_corrupt", f"{found[1]} x {found[0]} pixels, {size[1]} x {size[0]} in the scan"
        )
    h, w = grid[::-1] if turned else grid
    profile = profile_of(picture) if config.convert_profiles else None
    stored = (h * geometry.patch_size, w * geometry.patch_size)
    pixels_hwc, scale = decode_pixels(
        picture,
        file,
        data,
        target=stored if config.dct_scaling else None,
        limits=limits,
        background=config.background_rgb,
        profile=profile,
    )
    width, height = picture.size
    covered = (height / scale, width / scale) if scale > 1 else None
    pixels_hwc = resize(pixels_hwc, h, w, geometry, covered=covered)
    if profile is not None and not follows_early(picture):
        with reject_as("image_corrupt", file):
            pixels_hwc = to_srgb(pixels_hwc, profile)
    # Turned last: the picture is small by now.
    return _upright(pixels_hwc, orientation)


def _upright(pixels_hwc: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """What is stored, turned as the EXIF orientation 1..8 says: 5 to 8 exchange rows and columns first."""
    if orientation >= 5:
        pixels_hwc = pixels_hwc.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels_hwc = pixels_hwc[::-1]
    if orientation in (2, 3, 6, 7):
        pixels_hwc = pixels_hwc[:, ::-1]
    return np.ascontiguousarray(pixels_hwc)
