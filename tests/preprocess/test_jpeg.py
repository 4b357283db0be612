"""JPEGs: decoded by libjpeg-turbo as Pillow would, refused as Pillow would, and scaled without a shift."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from preprocess.config import ImageConfig, ImageLimits
from preprocess.images import ImageError, load_image, read_header
from preprocess.images import decode as decoder
from preprocess.images.header import open_picture
from shared.geometry import Geometry, resize_grid
from tests.preprocess.inputs import encode, noise

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

LIMITS = ImageLimits()
KINDS: tuple[dict[str, Any], ...] = (
    {"subsampling": 0},
    {"subsampling": 1},
    {"subsampling": 2},
    {"progressive": True},
    {"restart_marker_rows": 1},
    {"quality": 20},
    {"keep_rgb": True},
)


def decode(data: bytes, target: tuple[int, int] | None = None) -> tuple[npt.NDArray[np.uint8], int]:
    file = io.BytesIO(data)
    picture, _ = open_picture(file, LIMITS)
    return decoder.decode_pixels(
        picture, file, data, target=target, limits=LIMITS, background=(255, 255, 255), profile=None
    )


def load(data: bytes, grid: tuple[int, int], geometry: Geometry, dct_scaling: bool) -> npt.NDArray[np.uint8]:
    header = read_header(io.BytesIO(data), limits=LIMITS)
    config = ImageConfig(dct_scaling=dct_scaling)
    size = (header.height, header.width)
    return load_image(data, size=size, grid=grid, geometry=geometry, limits=LIMITS, config=config)


def refuse_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("decoded by Pillow")

    monkeypatch.setattr(Image.Image, "load", refuse)


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (7, 7), (16, 16), (33, 50)])
def test_every_pixel_is_pillows(
    size: tuple[int, int], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    colour = encode(noise(1, *size), "JPEG", **options)
    grey = encode(noise(2, *size)[..., 0], "JPEG", **{**options, "subsampling": -1})
    expected = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in (colour, grey)]
    refuse_pillow(monkeypatch)
    for data, pixels in zip((colour, grey), expected, strict=True):
        np.testing.assert_array_equal(decode(data)[0], pixels)


def test_every_pixel_of_real_pictures_is_pillows(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(shared_data / "cc12m" / "cc12m-train-0000.tar") as tar:
        members = [member for member in tar if member.name.endswith(".jpg")]
        pictures = [file.read() for member in members if (file := tar.extractfile(member))]
    assert len(pictures) == 32
    expected = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in pictures]
    refuse_pillow(monkeypatch)
    for data, pixels in zip(pictures, expected, strict=True):
        np.testing.assert_array_equal(decode(data)[0], pixels)


def verdict_ref(data: bytes) -> str:
    try:
        picture = Image.open(io.BytesIO(data), formats=["JPEG"])
    except Exception:
        return "image_unreadable"
    try:
        picture.convert("RGB")
    except Exception:
        return "image_corrupt"
    return "decoded"


def verdict(data: bytes, dct_scaling: bool) -> str:
    geometry = Geometry(patch_size=4, merge=1, max_patches_per_image=4)
    try:
        header = read_header(io.BytesIO(data), limits=LIMITS)
        [[h, w]] = resize_grid(np.array([header.height]), np.array([header.width]), geometry).tolist()
        load(data, (h, w), geometry, dct_scaling)
    except ImageError as error:
        return error.reason
    return "decoded"


def damaged(data: bytes, generator: np.random.Generator) -> bytes:
    """Cut off, overwritten in a few places, or with a few bytes put in and taken out."""
    broken, place = bytearray(data), int(generator.integers(1, len(data)))
    match generator.integers(3):
        case 0:
            return data[:place]
        case 1:
            for each in generator.integers(0, len(data), generator.integers(1, 6)).tolist():
                broken[each] = generator.integers(256)
            return bytes(broken)
        case _:
            more = generator.integers(0, 256, generator.integers(0, 20), np.uint8).tobytes()
            return data[:place] + more + data[place + int(generator.integers(0, 20)) :]


@pytest.mark.parametrize("dct_scaling", [True, False])
def test_a_damaged_jpeg_is_refused_exactly_where_pillow_refuses_it(dct_scaling: bool) -> None:
    generator = np.random.default_rng(0)
    # Smooth pictures with some noise: the places of damage fall into headers and pixels alike.
    smooth = np.add.outer(np.arange(60), np.arange(80))[..., None] + noise(3, 60, 80) // 8
    sources = [encode(smooth.astype(np.uint8), "JPEG", **options) for options in KINDS]
    counts = {"decoded": 0, "image_corrupt": 0, "image_unreadable": 0}
    for data in sources:
        for _ in range(60):
            broken = damaged(data, generator)
            expected = verdict_ref(broken)
            found = verdict(broken, dct_scaling)
            if found not in ("image_too_many_pixels", "image_too_elongated"):  # a size made large by damage
                assert found == expected, broken.hex()
                counts[expected] += 1
    assert min(counts.values()) > 20, counts


def test_a_jpeg_cut_before_its_last_marker_is_refused_and_one_with_garbage_behind_is_not() -> None:
    data = encode(noise(4, 40, 40), "JPEG")
    assert data.endswith(b"\xff\xd9")
    for dct_scaling in (True, False):
        assert verdict(data, dct_scaling) == "decoded"
        assert verdict(data + b"garbage", dct_scaling) == "decoded"
        assert verdict(data[:-2], dct_scaling) == verdict_ref(data[:-2]) == "image_corrupt"


@pytest.mark.parametrize(
    ("size", "target", "scale"),
    [
        # 1.5 times the target has to remain on both sides.
        ((1200, 1200), (100, 100), 8),
        ((1199, 1200), (100, 100), 4),
        ((600, 600), (100, 100), 4),
        ((599, 4000), (100, 100), 2),
        ((300, 300), (100, 100), 2),
        ((299, 300), (100, 100), 1),
        ((50, 50), (100, 100), 1),
        ((1200, 300), (25, 100), 2),  # the narrower side decides
    ],
)
def test_a_jpeg_is_scaled_as_far_as_the_margin_allows(
    size: tuple[int, int], target: tuple[int, int], scale: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(np.full((*size, 3), 90, np.uint8), "JPEG")
    refuse_pillow(monkeypatch)
    pixels, found = decode(data, target)
    assert found == scale
    assert pixels.shape == (-(-size[0] // scale), -(-size[1] // scale), 3)
    assert decode(data)[0].shape == (*size, 3)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("sides", [(89, 96), (97, 89), (90, 103)])
def test_a_scaled_picture_is_not_shifted_where_its_sides_are_no_multiples(
    sides: tuple[int, int], orientation: int
) -> None:
    height, width = sides
    # Light grows along both sides: stretched over the rest of its last block, the picture loses 8 levels per side
    # at its end. 2 remain, because such a block holds one row and copies of it.
    ramp = np.add.outer(np.linspace(0, 127, height), np.linspace(0, 127, width))
    pixels = np.rint(ramp).astype(np.uint8)[..., None].repeat(3, axis=2)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(pixels, "JPEG", quality=95, exif=exif)
    geometry = Geometry(patch_size=4, merge=1)
    assert decode(data, (4, 4))[1] == 8
    scaled, full = (load(data, (1, 1), geometry, dct_scaling) for dct_scaling in (True, False))
    assert np.abs(scaled.astype(int) - full).max() <= 5
    assert full.max() > 200


def test_scaled_decoding_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(noise(5, 96, 96), "JPEG")
    geometry = Geometry(patch_size=4, merge=1)
    scaled, full = (load(data, (1, 1), geometry, dct_scaling) for dct_scaling in (True, False))
    assert (scaled != full).any()
    monkeypatch.setattr(decoder, "MARGIN", 1000)
    np.testing.assert_array_equal(load(data, (1, 1), geometry, True), full)


def test_scaled_pictures_are_near_those_of_the_full_decode(shared_data: Path) -> None:
    with tarfile.open(shared_data / "photos" / "photos-jpeg-000000.tar") as tar:
        members = [member for member in tar if member.name.endswith(".jpg")]
        pictures = [file.read() for member in members if (file := tar.extractfile(member))]
    geometry = Geometry(merge=1, max_patches_per_image=64)
    decibels: list[float] = []
    for data in pictures:
        header = read_header(io.BytesIO(data), limits=LIMITS)
        [[h, w]] = resize_grid(np.array([header.height]), np.array([header.width]), geometry).tolist()
        scaled, full = (load(data, (h, w), geometry, dct_scaling) for dct_scaling in (True, False))
        if (square := np.mean((scaled.astype(float) - full) ** 2)) > 0:
            decibels.append(float(10 * np.log10(255**2 / square)))
    assert len(decibels) > 30
    assert np.median(decibels) >= 45 and np.percentile(decibels, 5) >= 36, sorted(decibels)
