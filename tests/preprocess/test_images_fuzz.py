"""Mutated pictures: decoded whole or rejected with a reason; never a crash, a hang or another size.

A child process decodes, as a decoder may take the process with it; the last input is then in its directory.
"""

from __future__ import annotations

import io
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from PIL import Image

from preprocess.config import ImageConfig, ImageLimits
from preprocess.images import ImageError, load_image, read_header
from tests.preprocess.inputs import GEOMETRY, encode, noise
from tests.preprocess.mutations import mutated, run_child

LIMITS = ImageLimits(max_pixels=1 << 20)


def good_files() -> dict[str, bytes]:
    """Small pictures of every format, with what makes their headers long: profiles, EXIF, frames, palettes."""
    pixels, turned = noise(0, 21, 34), Image.Exif()
    turned[0x0112] = 6
    smooth = Image.fromarray(noise(1, 5, 8)).resize((90, 70))
    frames = [Image.fromarray(noise(number, 20, 30)) for number in range(3)]
    return {
        "baseline.jpg": encode(smooth, "JPEG", quality=90, exif=turned),
        "progressive.jpg": encode(smooth, "JPEG", progressive=True, subsampling=2),
        "cmyk.jpg": encode(smooth.convert("CMYK"), "JPEG"),
        "rgb.png": encode(pixels, exif=turned),
        "grey16.png": encode(Image.fromarray(pixels[..., 0].astype(np.uint16) * 200)),
        "palette.png": encode(Image.fromarray(pixels).quantize(16), transparency=3),
        "lossy.webp": encode(smooth, "WEBP", quality=50),
        "animated.webp": encode(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "animated.gif": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "rle.bmp": encode(Image.fromarray(pixels), "BMP"),
        "deflate.tif": encode(Image.fromarray(pixels), "TIFF", compression="tiff_adobe_deflate"),
        "jpeg2000.jp2": encode(smooth, "JPEG2000"),
        "avif.avif": encode(smooth, "AVIF", quality=60),
        "plain.ppm": encode(Image.fromarray(pixels), "PPM"),
    }


def check_picture(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    begin = time.process_time()
    try:
        header = read_header(io.BytesIO(content), limits=LIMITS)
        pixels = load_image(
            content,
            size=(header.height, header.width),
            grid=(2, 4),
            geometry=GEOMETRY,
            limits=LIMITS,
            config=ImageConfig(),
        )
        assert pixels.shape == (8, 16, 3) and pixels.dtype == np.uint8
    except ImageError as error:
        assert error.reason and "\n" not in str(error)
    assert time.process_time() - begin < 20


def decode_mutated(directory: str, names: Sequence[str], examples: int) -> None:
    warnings.simplefilter("ignore")
    rules = settings(
        max_examples=examples, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    for number, name in enumerate(names):
        content = good_files()[name]
        check_picture(Path(directory, name), content)
        # Arguments that are not given are passed on by the call.
        seed(number)(rules(given(content=mutated(content))(check_picture)))(path=Path(directory, name))


def test_mutated_pictures_are_decoded_whole_or_rejected(tmp_path: Path) -> None:
    run_child(decode_mutated, tmp_path, list(good_files()), 20)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(good_files()))
def test_many_mutated_pictures_are_decoded_whole_or_rejected(tmp_path: Path, name: str) -> None:
    run_child(decode_mutated, tmp_path, [name], 1000)
