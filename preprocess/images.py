"""Encoded picture -> RGB -> resized RGB. The scan reads headers only; the pack decodes once and copies once.

No size is taken on trust: both passes hold it against the limit before a pixel is decoded.

Both passes see a picture as a viewer shows it: EXIF orientation applied, first frame of an animation, alpha
over white, 16-bit grey scaled to 8 bits.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from shared.geometry import Geometry

# Damaged metadata is no news in a job over millions of files: what matters becomes a reject.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Pillow's pixels are read-only and nothing here writes to them.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

# Raster formats of the web. Others Pillow knows run programs (EPS starts Ghostscript), decode when they are
# opened (ICO, at whatever size its picture has) or are not pictures.
Image.init()
_FORMATS = tuple(
    name
    for name in ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
    if name in Image.OPEN
)

# Made RGB at a time: every step of that has a copy, of 16 MB with this.
_BAND_PIXELS = 4 << 20

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class Header:
    """A picture's size in pixels as displayed."""

    height: int
    width: int


class ImageError(ValueError):
    """A picture that is rejected: `reason` is counted, the message is the detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def read_header(file: BinaryIO, *, max_pixels: int, max_bytes: int) -> Header:
    """Size as displayed, without decoding a pixel; of the file no more is read than its format's header needs.

    Raises:
        ImageError: empty, unknown format, or beyond a limit.
    """
    num_bytes = file.seek(0, io.SEEK_END)
    if not num_bytes:
        raise ImageError("image_empty", "0 bytes")
    if num_bytes > max_bytes:
        raise ImageError("image_too_many_bytes", f"{num_bytes} bytes, limit {max_bytes}")
    picture, orientation = _open(file, max_pixels)
    width, height = picture.size
    return Header(width, height) if orientation >= 5 else Header(height, width)


def decode(data: bytes, *, max_pixels: int) -> npt.NDArray[np.uint8]:
    """RGB uint8 [H, W, 3] as displayed.

    Raises:
        ImageError: beyond the limit, or the pixels cannot be decoded, all of them.
    """
    file = io.BytesIO(data)
    picture, orientation = _open(file, max_pixels)
    quiet = _quiet_stderr() if picture.format == "TIFF" else nullcontext()
    with _reject_as("image_corrupt", file), _guard(max_pixels), quiet:
        return _displayed(picture, orientation)


def resize(image_hwc: npt.NDArray[np.uint8], h: int, w: int, geometry: Geometry) -> npt.NDArray[np.uint8]:
    """Antialiased resize, uint8 [H, W, 3] -> uint8 [h * p, w * p, 3].

    torch's uint8 kernel for channels-last pictures: vectorized fixed-point arithmetic, first the width, then
    the height, within a level of Pillow's result in that order (two in less than one value of a million).
    What it is worth: benchmarks/images.py.
    """
    height, width = h * geometry.patch_size, w * geometry.patch_size
    if image_hwc.shape[:2] == (height, width):
        return image_hwc
    # A view: [1, 3, H, W] with channels last in memory; torch 2.13 misreads other orders of one-pixel columns.
    picture = torch.from_numpy(np.ascontiguousarray(image_hwc)).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(
        picture, size=(height, width), mode=geometry.filter, antialias=True, align_corners=False
    )
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def _open(file: BinaryIO, max_pixels: int) -> tuple[Image.Image, int]:
    """The picture, not yet decoded and within the limit, and its EXIF orientation."""
    with _reject_as("image_unreadable", file), _guard(max_pixels):
        picture = Image.open(file, formats=_FORMATS)
        orientation = _orientation(picture, file)
    width, height = picture.size
    if width < 1 or height < 1:
        raise ImageError("image_unreadable", f"size {width} x {height}")
    if width * height > max_pixels:
        raise ImageError("image_too_many_pixels", f"{width} x {height} pixels, limit {max_pixels}")
    return picture, orientation


@contextmanager
def _guard(max_pixels: int) -> Generator[None, None, None]:
    """Pillow's own limit, for sizes it meets inside a file: a canvas, a tile, a frame. It refuses from twice on."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


@contextmanager
def _quiet_stderr() -> Generator[None, None, None]:
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


@contextmanager
def _reject_as(reason: str, file: BinaryIO) -> Generator[None, None, None]:
    """The border between one sample's bytes and the job: decoders raise anything on broken input.

    What is no fault of the bytes goes on to the executor, which tries again: a shortage of memory, and an error
    of the operating system, which has a number.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        detail = f"{type(error).__name__}: {error}"
        if isinstance(error, UnidentifiedImageError):  # its message names an object of this process
            detail = f"no header of {', '.join(_FORMATS)}"
        if isinstance(error, Image.DecompressionBombError):
            reason = "image_too_many_pixels"
        num_bytes = file.seek(0, io.SEEK_END)
        file.seek(0)
        first = file.read(8).hex()
        raise ImageError(reason, f"{detail[:120]} ({num_bytes} bytes, first {first})") from None


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


def _displayed(picture: Image.Image, orientation: int) -> npt.NDArray[np.uint8]:
    """RGB [H, W, 3], turned upright: made in bands, so that only the picture as decoded and this are whole."""
    width, height = picture.size
    if width * height <= _BAND_PIXELS:
        return _upright(picture, orientation)
    turned = orientation >= 5
    out_hwc = np.empty((width, height, 3) if turned else (height, width, 3), np.uint8)
    rows = max(1, _BAND_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        pixels = _upright(picture.crop((0, top, width, bottom)), orientation)
        # The first stored row is displayed at the bottom or on the right.
        first, last = (height - bottom, height - top) if orientation in (3, 4, 6, 7) else (top, bottom)
        out_hwc[(slice(None), slice(first, last)) if turned else slice(first, last)] = pixels
    return out_hwc


def _upright(picture: Image.Image, orientation: int) -> npt.NDArray[np.uint8]:
    rgb = _to_rgb(picture)
    return np.asarray(rgb.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else rgb)


def _to_rgb(picture: Image.Image) -> Image.Image:
    """Every mode to RGB: alpha over white, palettes resolved, 16-bit grey scaled instead of clipped."""
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I;16") or picture.mode == "I":
        values = np.asarray(picture)
        # 65535 / 255 = 257: full white stays white. 128 rounds.
        grey = ((values.clip(0, 65535).astype(np.uint32) + 128) // 257).astype(np.uint8)
        if isinstance(clear := picture.info.get("transparency"), int):
            grey[values == clear] = 255
        return Image.fromarray(grey).convert("RGB")
    if picture.mode == "F":
        raise ValueError("floating-point pictures have no agreed range")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        background = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(background, layer).convert("RGB")
    return picture.convert("RGB")
