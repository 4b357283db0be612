"""What a picture's header says: its size as displayed, held against every limit before a pixel is decoded."""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass
from typing import BinaryIO

from PIL import ExifTags, Image, UnidentifiedImageError

from preprocess.config import ImageLimits
from preprocess.images.errors import ImageError, pillow_limit, reject_as
from preprocess.images.jpeg_header import plain_size

# Damaged metadata is no news in a job over millions of files: what matters becomes a reject.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Raster formats of the web. Others Pillow knows run programs (EPS starts Ghostscript), decode when they are
# opened (ICO, at whatever size its picture has) or are not pictures.
Image.init()
FORMATS = tuple(
    name
    for name in ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
    if name in Image.OPEN
)


# Of a JPEG, read at once: what a buffered file reads anyway, and enough for tables and a common colour profile.
HEAD_BYTES = 8192


# Of limits.max_pixels, for formats that take more memory per pixel than others (benchmarks/image_memory.py): OpenJPEG
# computes in 32 bits per value, Pillow holds a WebP and its decoder's copy in four channels.
PIXEL_SHARES = {"JPEG2000": (2, 3), "WEBP": (7, 8)}


@dataclass(frozen=True, slots=True)
class Header:
    """A picture's size in pixels as displayed."""

    height: int
    width: int


def read_header(file: BinaryIO, *, limits: ImageLimits) -> Header:
    """Size as displayed, without decoding a pixel; of the file no more is read than its format's header needs.

    Raises:
        ImageError: empty, unknown format, or beyond a limit.
    """
    num_bytes = file.seek(0, io.SEEK_END)
    if not num_bytes:
        raise ImageError("image_empty", "0 bytes")
    if num_bytes > limits.max_bytes:
        raise ImageError("image_too_many_bytes", f"{num_bytes} bytes, limit {limits.max_bytes}")
    file.seek(0)
    if (size := plain_size(file.read(HEAD_BYTES))) and 0 < size[0] * size[1] <= limits.max_pixels:
        header = Header(*size)
        _check_size(header.width, header.height, "JPEG", limits)
        return header
    picture, orientation = open_picture(file, limits)
    width, height = picture.size
    return Header(width, height) if orientation >= 5 else Header(height, width)


def open_picture(file: BinaryIO, limits: ImageLimits) -> tuple[Image.Image, int]:
    """The picture, not yet decoded and within the limits, and the EXIF orientation that is still to be applied."""
    with reject_as("image_unreadable", file), pillow_limit(limits.max_pixels):
        try:
            picture = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:  # its message names an object of this process
            raise UnidentifiedImageError(f"no header of {', '.join(FORMATS)}") from None
        orientation = _orientation(picture, file)
    _check_size(*picture.size, picture.format, limits)
    return picture, orientation


def _check_size(width: int, height: int, format: str | None, limits: ImageLimits) -> None:
    share, of = PIXEL_SHARES.get(format or "", (1, 1))
    max_pixels = limits.max_pixels * share // of
    short, long = min(width, height), max(width, height)
    size = f"{width} x {height} pixels"
    if short < 1:
        raise ImageError("image_unreadable", size)
    if width * height > max_pixels:
        raise ImageError("image_too_many_pixels", f"{size}, limit {max_pixels}")
    if long > limits.max_side:
        raise ImageError("image_side_too_long", f"{size}, limit {limits.max_side}")
    if short < limits.min_side:
        raise ImageError("image_side_too_short", f"{size}, limit {limits.min_side}")
    if long > limits.max_aspect * short:
        raise ImageError(
            "image_too_elongated", f"{size}, {long / short:.4g} : 1, limit {limits.max_aspect:g}"
        )


def _orientation(picture: Image.Image, file: BinaryIO) -> int:
    """EXIF orientation 1..8 that is still to be applied; 1 when there is none or it cannot be read."""
    if picture.format == "TIFF":
        return 1  # Pillow turns these itself, and `size` is the turned one
    # Pillow would decode the whole PNG to look behind the pixels.
    search = picture.format == "PNG" and not ({"exif", "Raw profile type exif"} & picture.info.keys())
    block = _png_exif(file) if search else b""
    try:
        exif = Image.Exif() if search else picture.getexif()
        if search:
            exif.load(b"Exif\x00\x00" + block)
        value = exif.get(ExifTags.Base.Orientation, 1)
    except (OSError, ValueError, SyntaxError, struct.error, TypeError, KeyError):
        return 1  # the pixels may be fine all the same
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _png_exif(file: BinaryIO) -> bytes:
    """The eXIf chunk of a PNG, found by walking chunk lengths: it may stand behind the pixels. Empty if none."""
    file.seek(8)
    while len(head := file.read(8)) == 8 and not head.endswith(b"IEND"):
        length, kind = struct.unpack(">I4s", head)
        if kind == b"eXIf":
            return file.read(length)
        file.seek(length + 4, io.SEEK_CUR)
    return b""
