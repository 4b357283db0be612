"""Colours: every mode that a decoder gives, and every embedded profile, to 8 bits of sRGB.

Two steps, because the costly one can wait for the resized picture: `opaque` takes a decoded picture to RGB of
8 bits without transparency, `to_srgb` follows the profile. Inks and what lies over a background do not mix as
their RGB does: `follows_early` says that `opaque` has followed the profile.

Profiles of RGB, grey and CMYK are followed; one that cannot be read, or is of other colours than the picture, is
no profile.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, PngImagePlugin

Pixels = npt.NDArray[np.uint8]
Transform = ImageCms.ImageCmsTransform

# What transforms read -> the modes whose colours such a profile describes.
_PROFILE_SPACES = {
    "RGB": ("RGB", ("RGB", "RGBA", "RGBa", "P", "PA")),
    "GRAY": ("L", ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B")),
    "CMYK": ("CMYK", ("CMYK",)),
}

_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")

# Rounding leaves this much between two profiles of the same colours.
_SAME_COLOURS = 2


def profile_of(picture: Image.Image) -> Transform | None:
    """The conversion of the picture's colours to sRGB that its profile asks for; None where it asks for none."""
    profile = picture.info.get("icc_profile")
    return _transform(profile, picture.mode) if isinstance(profile, bytes) and profile else None


def scale_clear_colour(picture: Image.Image) -> None:
    """Before the picture is loaded: Pillow compares the clear colour of a PNG, as the file has it, with pixels that
    it has brought to 8 bits. Of 16 bits per colour it keeps the upper 8, so nearest neighbours become clear too.
    """
    if not isinstance(picture, PngImagePlugin.PngImageFile) or not picture.tile:
        return
    clear, rawmode = picture.info.get("transparency"), picture.tile[0].args
    if rawmode in ("L;2", "L;4") and isinstance(clear, int):
        picture.info["transparency"] = clear * (85 if rawmode == "L;2" else 17)
    elif rawmode == "RGB;16B" and isinstance(clear, tuple):
        picture.info["transparency"] = tuple(value >> 8 for value in clear)


def has_alpha(picture: Image.Image) -> bool:
    return picture.mode in _ALPHA or "transparency" in picture.info


def follows_early(picture: Image.Image) -> bool:
    """Whether `opaque` follows the profile."""
    return picture.mode == "CMYK" or has_alpha(picture)


def opaque(picture: Image.Image, background: tuple[int, int, int], profile: Transform | None) -> Pixels:
    """Any decoded picture to RGB uint8 [H, W, 3]: palettes resolved, 16-bit grey scaled and not clipped, inks as
    they print, transparency over the background."""
    mode = picture.mode
    if mode.startswith("I;16") or mode == "I":
        return _from_sixteen_bits(picture, background)
    if mode == "F":
        raise ValueError("floating-point pictures have no agreed range")
    if mode == "CMYK" and profile is not None:
        return to_srgb(np.asarray(picture), profile)
    if has_alpha(picture):
        return _over(picture.convert("RGBA"), background, profile)
    return np.asarray(picture.convert("RGB"))  # inks: (255 - ink) * (255 - black) / 255


def to_srgb(pixels_hwc: Pixels, profile: Transform) -> Pixels:
    """uint8 [H, W, C] to sRGB uint8 [H, W, 3]."""
    # Grey is three equal channels by now.
    channels = pixels_hwc[..., 0] if profile.input_mode == "L" else pixels_hwc
    picture = Image.fromarray(np.ascontiguousarray(channels), profile.input_mode)
    return np.asarray(profile.apply(picture))


def _from_sixteen_bits(picture: Image.Image, background: tuple[int, int, int]) -> Pixels:
    values_hw = np.asarray(picture)
    # 65535 / 255 = 257: full white stays white. 128 rounds.
    grey_hw = ((values_hw.clip(0, 65535).astype(np.uint32) + 128) // 257).astype(np.uint8)
    pixels_hwc = np.repeat(grey_hw[..., None], 3, axis=2)
    if isinstance(clear := picture.info.get("transparency"), int):
        pixels_hwc[values_hw == clear] = background
    return pixels_hwc


def _over(layer: Image.Image, background: tuple[int, int, int], profile: Transform | None) -> Pixels:
    if profile is not None:
        alpha = layer.getchannel("A")
        layer = Image.fromarray(to_srgb(np.asarray(layer.convert("RGB")), profile))
        layer.putalpha(alpha)
    below = Image.new("RGBA", layer.size, (*background, 255))
    return np.asarray(Image.alpha_composite(below, layer).convert("RGB"))


# A job meets few profiles, each in very many pictures. A CMYK profile takes half a megabyte and its transform 50 ms.
@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> Transform | None:
    """As image editors do by default: white stays white, black black, and what sRGB does not hold is clipped."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space, modes = _PROFILE_SPACES.get(getattr(opened.profile, "xcolor_space", "").strip(), ("", ()))
        if mode not in modes:
            return None
        transform = ImageCms.buildTransform(
            opened,
            ImageCms.createProfile("sRGB"),
            space,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    return None if space != "CMYK" and _changes_nothing(transform) else transform


def _changes_nothing(transform: Transform) -> bool:
    """Most profiles are sRGB itself: found out by its colours, since there are hundreds of files of it."""
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    lattice_hwc = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(len(steps), -1, 3)
    if transform.input_mode == "L":
        lattice_hwc = np.repeat(lattice_hwc[..., :1], 3, axis=2)
    moved_hwc = np.abs(to_srgb(lattice_hwc, transform).astype(np.int16) - lattice_hwc)
    return int(moved_hwc.max()) <= _SAME_COLOURS
