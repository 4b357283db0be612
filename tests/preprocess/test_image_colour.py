"""Embedded profiles and inks: what a viewer shows, from profiles written here byte by byte."""

from __future__ import annotations

import io
import struct

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageCms

from preprocess.config import ImageConfig, ImageLimits
from preprocess.images import load_image, read_header
from preprocess.images.colour import profile_of
from shared.geometry import Geometry
from tests.preprocess.inputs import encode, noise

PIXELS = Geometry(patch_size=1, merge=1, max_patches_per_image=1 << 20)
# The colours of Display P3 as D50 XYZ, and the linear matrix from it to sRGB (both as published).
P3_XYZ = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
P3_TO_SRGB = np.array([[1.2249, -0.2247, 0], [-0.0420, 1.0419, 0], [-0.0197, -0.0786, 1.0979]])


def load(data: bytes, **changes: object) -> npt.NDArray[np.uint8]:
    header = read_header(io.BytesIO(data), limits=ImageLimits())
    size = (header.height, header.width)
    config = ImageConfig(**changes)  # type: ignore[arg-type]
    return load_image(data, size=size, grid=size, geometry=PIXELS, limits=ImageLimits(), config=config)


def s15(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def profile(space: bytes, pcs: bytes, kind: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of version 2: 128 bytes of header, a table of tags, the tags."""
    table, body = b"", b""
    start = 132 + 12 * len(tags)
    for name, content in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(content))
        body += content + b"\0" * (-len(content) % 4)
    rest = struct.pack(">I", len(tags)) + table + body
    header = struct.pack(">I4sI4s4s4s", 128 + len(rest), b"lcms", 0x02400000, kind, space, pcs)
    header += b"\0" * 12 + b"acsp" + b"\0" * 28 + s15(0.9642, 1.0, 0.8249)  # D50
    return header.ljust(128, b"\0") + rest


def gamma_curve(gamma: float) -> bytes:
    return b"curv" + struct.pack(">IIH", 0, 1, round(gamma * 256))


def rgb_profile(gamma: float, colours: tuple[tuple[float, ...], ...] = P3_XYZ) -> bytes:
    # Paper of a warm tone: its white is white all the same.
    tags = {b"wtpt": b"XYZ \0\0\0\0" + s15(0.8, 0.8, 0.5)}
    for letter, xyz in zip((b"r", b"g", b"b"), colours, strict=True):
        tags[letter + b"XYZ"] = b"XYZ \0\0\0\0" + s15(*xyz)
        tags[letter + b"TRC"] = gamma_curve(gamma)
    return profile(b"RGB ", b"XYZ ", b"scnr", tags)


def grey_profile(gamma: float) -> bytes:
    white = b"XYZ \0\0\0\0" + s15(0.9642, 1.0, 0.8249)
    return profile(b"GRAY", b"XYZ ", b"mntr", {b"wtpt": white, b"kTRC": gamma_curve(gamma)})


def ink_profile() -> bytes:
    """Inks unlike any: cyan prints a grey of L* 50, every other ink, alone or with others, black."""
    ramp = bytes(range(256))
    corners = b""
    for corner in range(16):  # the last ink, black, moves fastest
        cyan, others = corner >> 3, corner & 7
        lightness = 0 if others else 128 if cyan else 255
        corners += bytes([lightness, 128, 128])
    table = b"mft1" + struct.pack(">I4B", 0, 4, 3, 2, 0) + s15(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table += ramp * 4 + corners + ramp * 3
    return profile(b"CMYK", b"Lab ", b"prtr", {b"A2B0": table, b"A2B1": table})


def srgb_of_linear(linear: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_display_p3_becomes_srgb(kind: str) -> None:
    colours = np.array(
        [[200, 100, 100], [128, 128, 128], [60, 120, 80], [255, 255, 255], [0, 0, 0]], np.uint8
    )
    pixels = np.tile(colours[:, None], (1, 16, 1)).repeat(16, axis=0)  # flat blocks survive JPEG
    options = (
        {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    )
    found = load(encode(pixels, kind, icc_profile=rgb_profile(2.2), **options))[8::16, 8]
    expected = srgb_of_linear((colours / 255.0) ** 2.2 @ P3_TO_SRGB.T)
    assert np.abs(found - expected).max() <= 2
    assert np.abs(found.astype(int) - colours).max() > 10  # the reds are redder in sRGB's numbers


def test_a_colour_that_srgb_does_not_hold_is_clipped() -> None:
    data = encode(np.array([[[0, 255, 0]]], np.uint8), icc_profile=rgb_profile(2.2))
    assert load(data)[0, 0].tolist() == [0, 255, 0]


@pytest.mark.parametrize("embedded", ["srgb", "garbage", "grey", "inks", ""])
def test_a_profile_of_srgb_or_of_no_use_changes_no_pixel(embedded: str) -> None:
    found = {
        "srgb": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        "garbage": rgb_profile(2.2)[:200],
        "grey": grey_profile(1.0),
        "inks": ink_profile(),
        "": b"",
    }
    pixels = noise(1, 9, 7)
    data = encode(pixels, icc_profile=found[embedded])
    assert profile_of(Image.open(io.BytesIO(data))) is None  # so that none is applied, at no cost
    np.testing.assert_array_equal(load(data), pixels)


def test_profiles_can_be_left_alone() -> None:
    pixels = noise(1, 9, 7)
    data = encode(pixels, icc_profile=rgb_profile(1.0))
    np.testing.assert_array_equal(load(data, convert_profiles=False), pixels)
    assert (load(data) != pixels).mean() > 0.9


@pytest.mark.parametrize("mode", ["L", "I;16"])
def test_grey_follows_its_profile(mode: str) -> None:
    values = np.array([[0, 64, 128, 255]], np.uint8)
    picture = Image.fromarray(values if mode == "L" else values.astype(np.uint16) * 257)
    found = load(encode(picture, icc_profile=grey_profile(1.0)))[0]
    # Linear light: 64 / 255 is sRGB's 137.1, 128 / 255 its 188.
    expected = srgb_of_linear(values[0] / 255.0)
    assert (found == found[:, :1]).all()
    assert np.abs(found[:, 0] - expected).max() <= 1


def test_the_background_is_srgb_whatever_the_profile() -> None:
    pixels = np.array([[[128, 128, 128, 255], [0, 0, 0, 0], [128, 128, 128, 51]]], np.uint8)
    data = encode(pixels, icc_profile=rgb_profile(1.0))
    found = load(data, background="#0a6432")[0].astype(int)
    # 128 / 255 of linear light is 188; a fifth of it and four fifths of (10, 100, 50).
    expected = [[188, 188, 188], [10, 100, 50], [45.6, 117.6, 77.6]]
    assert np.abs(found - expected).max() <= 1


INKS = [(255, 0, 0, 0), (0, 0, 0, 255), (0, 0, 0, 0), (255, 255, 0, 0)]


def ink_blocks() -> Image.Image:
    """A block of 16 x 16 for every one of INKS, side by side."""
    return Image.fromarray(np.array(INKS, np.uint8).repeat(16, axis=0)[None].repeat(16, axis=0), "CMYK")


def in_blocks(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    return pixels[8, 8::16].astype(np.int64)


def without_adobe(data: bytes) -> bytes:
    """A JPEG without its marker APP14."""
    place = data.index(b"\xff\xee")
    (length,) = struct.unpack(">H", data[place + 2 : place + 4])
    return data[:place] + data[place + 2 + length :]


def test_inks_without_a_profile_follow_the_plain_formula() -> None:
    # (255 - ink) * (255 - black) / 255
    expected = [[0, 255, 255], [0, 0, 0], [255, 255, 255], [0, 0, 255]]
    for data in (encode(ink_blocks(), "TIFF"), encode(ink_blocks(), "JPEG", quality=100)):
        assert np.abs(in_blocks(load(data)) - expected).max() <= 2


def test_a_jpeg_of_inks_is_negative_only_where_adobe_says_so() -> None:
    data = encode(ink_blocks(), "JPEG", quality=100)  # Pillow writes the negative, as Adobe does, and says so
    # Without Adobe's word the same numbers are ink: 0 ink is paper, 255 of all is black.
    expected = [[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert np.abs(in_blocks(load(without_adobe(data))) - expected).max() <= 2
    positive = Image.fromarray(255 - np.asarray(ink_blocks()), "CMYK")
    plain = without_adobe(encode(positive, "JPEG", quality=100))
    assert (
        np.abs(in_blocks(load(plain)) - [[0, 255, 255], [0, 0, 0], [255, 255, 255], [0, 0, 255]]).max() <= 2
    )


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_inks_with_a_profile_are_what_it_says(kind: str) -> None:
    options = {"quality": 100} if kind == "JPEG" else {}
    found = in_blocks(load(encode(ink_blocks(), kind, icc_profile=ink_profile(), **options)))
    # L* of 128 / 255 * 100 = 50.2 is a grey of 119.4 in sRGB: Y = ((50.2 + 16) / 116)**3 = 0.186.
    assert np.abs(found - [[119] * 3, [0] * 3, [255] * 3, [0] * 3]).max() <= 3
