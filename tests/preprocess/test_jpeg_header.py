"""The short way to a JPEG's size: whatever it says, Pillow says too, and what Pillow objects to it leaves to Pillow."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from preprocess.config import ImageLimits
from preprocess.images import ImageError, read_header
from preprocess.images import header as headers
from preprocess.images.jpeg_header import plain_size
from tests.preprocess.inputs import noise

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]

LIMITS = ImageLimits(max_pixels=5000, max_aspect=20)
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def jpeg(mode: str = "RGB", **options: Any) -> bytes:
    """48 x 32 pixels."""
    file = io.BytesIO()
    Image.fromarray(noise(0, 32, 48)).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


PLAIN = {
    "baseline": jpeg(),
    "progressive": jpeg(progressive=True),
    "grey": jpeg("L"),
    "inks": jpeg("CMYK"),
    "profile": jpeg(icc_profile=PROFILE),
    "comment": jpeg(comment=b"a comment", restart_marker_rows=1),
    "own tables": jpeg(qtables=[[2] * 64, [3] * 64]),
}
TURNED = Image.Exif()
TURNED[0x0112] = 6


def verdict(data: bytes) -> tuple[int, int] | tuple[str, str]:
    try:
        header = read_header(io.BytesIO(data), limits=LIMITS)
    except ImageError as error:
        return error.reason, str(error)
    return header.height, header.width


def verdict_of_pillow(data: bytes) -> tuple[int, int] | tuple[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(headers, "plain_size", lambda head: None)
        return verdict(data)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_jpegs_of_every_kind_go_the_short_way(name: str) -> None:
    assert plain_size(PLAIN[name]) == (32, 48) == verdict_of_pillow(PLAIN[name])


def test_what_turns_a_picture_or_makes_it_one_of_several_is_left_to_pillow() -> None:
    turned = jpeg(exif=TURNED)
    said_twice = jpeg(xmp=b'<x tiff:Orientation="6"/>')
    assert plain_size(turned) is None and verdict(turned) == (48, 32)
    assert plain_size(said_twice) is None and verdict(said_twice) == (48, 32)
    file = io.BytesIO()
    pictures = [Image.fromarray(noise(seed, 32, 48)) for seed in range(2)]
    pictures[0].save(file, "MPO", save_all=True, append_images=pictures[1:])
    assert plain_size(file.getvalue()) is None and verdict(file.getvalue()) == (32, 48)


def test_a_damaged_header_has_the_verdict_of_pillow_to_the_word() -> None:
    generator = np.random.default_rng(0)
    short = 0
    for data in PLAIN.values():
        end = data.index(b"\xff\xda") + 12
        for _ in range(500):
            broken = bytearray(data)
            place = int(generator.integers(end))
            # Mostly near a marker, where lengths and numbers are.
            if generator.random() < 0.7:
                place = max(0, broken.rfind(b"\xff", 0, place)) + int(generator.integers(10))
            match int(generator.integers(4)):
                case 0:
                    broken[place] = generator.integers(256)
                case 1:
                    broken[place] ^= 1 << generator.integers(8)
                case 2:
                    del broken[place : place + int(generator.integers(1, 20))]
                case _:
                    del broken[place:]
            assert verdict(bytes(broken)) == verdict_of_pillow(bytes(broken)), broken.hex()
            short += plain_size(bytes(broken)) is not None
    assert short > 500  # damage to what a table holds is none to the header


def test_limits_hold_on_the_short_way() -> None:
    large = Image.new("RGB", (101, 50))
    file = io.BytesIO()
    large.save(file, "JPEG")
    assert verdict(file.getvalue()) == ("image_too_many_pixels", "101 x 50 pixels, limit 5000")
    flat = io.BytesIO()
    Image.new("RGB", (600, 8)).save(flat, "JPEG")
    assert verdict(flat.getvalue())[0] == "image_too_elongated"
    assert verdict(flat.getvalue()) == verdict_of_pillow(flat.getvalue())


def test_real_pictures_have_the_size_that_pillow_gives_them(shared_data: Path) -> None:
    sizes = 0
    for path in (shared_data / "cc12m/cc12m-train-0000.tar", *sorted((shared_data / "photos").glob("*.tar"))):
        with tarfile.open(path) as tar:
            for member in tar:
                if not member.name.endswith((".jpg", ".png", ".webp")):
                    continue
                file = tar.extractfile(member)
                assert file is not None
                data = file.read()
                assert verdict(data) == verdict_of_pillow(data), member.name
                sizes += plain_size(data[: headers.HEAD_BYTES]) is not None
    assert sizes > 40
