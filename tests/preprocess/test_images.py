"""Pictures: what is displayed, what is refused, and that the header alone says how large."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps, WebPImagePlugin

from preprocess.config import ImageConfig, ImageLimits
from preprocess.images import Header, ImageError, load_image, read_header, resize
from shared.geometry import Geometry
from tests.preprocess.inputs import encode, noise, png
from tests.preprocess.reference import pillow_resized

# What damaged files make Pillow say beside.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]

LIMITS = ImageLimits()
ORIENTATION = 0x0112


# One patch per pixel: a picture is as large afterwards as before.
PIXELS = Geometry(patch_size=1, merge=1, max_patches_per_image=1 << 26)


def header_of(data: bytes, limits: ImageLimits = LIMITS) -> Header:
    return read_header(io.BytesIO(data), limits=limits)


def decode(
    data: bytes | memoryview, config: ImageConfig | None = None, limits: ImageLimits = LIMITS
) -> npt.NDArray[np.uint8]:
    """All pixels, as `load_image` gives them when there is nothing to resize."""
    header = header_of(bytes(data), limits)
    size = (header.height, header.width)
    config = config or ImageConfig()
    return load_image(data, size=size, grid=size, geometry=PIXELS, limits=limits, config=config)


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[ORIENTATION] = orientation
    return block


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


# Stored: row 0 is (a, b, c), row 1 is (d, e, f). The EXIF standard says where row 0 and column 0 of what is
# stored are when it is displayed: 1 top left, 2 top right, 3 bottom right, 4 bottom left, 5 left top,
# 6 right top, 7 right bottom, 8 left bottom.
A, B, C, D, E, F = 10, 50, 90, 130, 170, 210
DISPLAYED = {
    1: [[A, B, C], [D, E, F]],
    2: [[C, B, A], [F, E, D]],
    3: [[F, E, D], [C, B, A]],
    4: [[D, E, F], [A, B, C]],
    5: [[A, D], [B, E], [C, F]],
    6: [[D, A], [E, B], [F, C]],
    7: [[F, C], [E, B], [D, A]],
    8: [[C, F], [B, E], [A, D]],
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_every_orientation_is_displayed_upright_and_the_header_knows_the_turned_size(
    orientation: int, kind: str
) -> None:
    stored = np.array(DISPLAYED[1], np.uint8)[..., None].repeat(3, axis=2)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    data = encode(stored, kind, exif=exif(orientation), **options)
    expected = np.array(DISPLAYED[orientation], np.uint8)
    pixels = decode(data)
    assert pixels.shape == (*expected.shape, 3)
    assert (pixels == expected[..., None]).all()
    assert header_of(data) == Header(*expected.shape)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_jpeg_equals_pillows_own_turning_of_it(orientation: int) -> None:
    data = encode(noise(1, 24, 40), "JPEG", exif=exif(orientation), quality=90)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decode(data), np.asarray(expected))
    assert header_of(data) == Header(*((40, 24) if orientation >= 5 else (24, 40)))


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_outside_1_to_8_turns_nothing(value: int) -> None:
    pixels = noise(2, 6, 9)
    data = encode(pixels, exif=exif(value))
    np.testing.assert_array_equal(decode(data), pixels)
    assert header_of(data) == Header(6, 9)


def test_an_exif_chunk_behind_the_pixels_of_a_png_turns_it_too() -> None:
    stored = np.array(DISPLAYED[1], np.uint8)[..., None].repeat(3, axis=2)
    plain = encode(stored)
    end = plain.rindex(b"IEND") - 4
    # Orientation 6 in the smallest TIFF block: one entry, type SHORT.
    block = b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHH", ORIENTATION, 3, 1, 6, 0) + b"\0\0\0\0"
    data = plain[:end] + chunk(b"eXIf", block) + plain[end:]
    assert header_of(data) == Header(3, 2)
    assert decode(data)[..., 0].tolist() == DISPLAYED[6]


def over_white(colour: float, alpha: float) -> int:
    return round((colour * alpha + 255 * (255 - alpha)) / 255)


def one_row(mode: str, *pixels: object) -> Image.Image:
    picture = Image.new(mode, (len(pixels), 1))
    picture.putdata(pixels)
    return picture


@pytest.mark.parametrize(
    ("picture", "options", "expected"),
    [
        pytest.param(
            one_row("RGBA", (200, 0, 40, 255), (200, 0, 40, 128), (200, 0, 40, 0)),
            {},
            # 128: 200 * 128/255 + 255 * 127/255 = 227.4, 0 -> 127, 40 -> 147.1
            [(200, 0, 40), (227, 127, 147), (255, 255, 255)],
            id="RGBA",
        ),
        pytest.param(
            one_row("LA", (0, 255), (0, 51), (100, 102)),
            {},
            # 51 = 255 / 5: 255 * 4/5 = 204. 102: 100 * 2/5 + 255 * 3/5 = 193
            [(0,) * 3, (204,) * 3, (193,) * 3],
            id="LA",
        ),
        pytest.param(one_row("L", 7, 8), {"transparency": 7}, [(255,) * 3, (8,) * 3], id="L, one grey clear"),
        pytest.param(
            one_row("RGB", (1, 2, 3), (1, 2, 4)),
            {"transparency": (1, 2, 3)},
            [(255, 255, 255), (1, 2, 4)],
            id="RGB, one colour clear",
        ),
        pytest.param(one_row("L", 0, 77, 255), {}, [(0,) * 3, (77,) * 3, (255,) * 3], id="L"),
        pytest.param(one_row("1", 0, 255), {}, [(0,) * 3, (255,) * 3], id="1 bit"),
    ],
)
def test_every_mode_becomes_rgb_over_white(
    picture: Image.Image, options: dict[str, object], expected: list[tuple[int, int, int]]
) -> None:
    assert [tuple(pixel) for pixel in decode(encode(picture, **options))[0].tolist()] == expected


def palette_picture() -> Image.Image:
    picture = one_row("P", 0, 1, 2)
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    return picture


def test_what_is_clear_shows_the_background() -> None:
    # 102 / 255 = 2/5: 200 * 2/5 + 50 * 3/5 = 110, 0 -> 30, 40 * 2/5 + 250 * 3/5 = 166
    data = encode(one_row("RGBA", (200, 0, 40, 102), (200, 0, 40, 0)))
    pixels = decode(data, ImageConfig(background="#3232fA"))
    assert pixels[0].tolist() == [[110, 30, 166], [50, 50, 250]]


@pytest.mark.parametrize("background", ["white", "#fff", "ffffff", "#fffffg", "#ffffff "])
def test_a_background_that_is_no_colour_is_an_error(background: str) -> None:
    with pytest.raises(ValueError, match="#rrggbb"):
        ImageConfig(background=background)


def png_file(width: int, depth: int, colour: int, row: bytes, clear: bytes) -> bytes:
    """One row of a PNG, written byte by byte: Pillow writes neither these depths nor these clear colours."""
    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", clear), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


@pytest.mark.parametrize(
    ("depth", "row", "clear", "expected"),
    [
        # 2 bits: 0, 1, 2, 3 are 0, 85, 170, 255; 1 is clear.
        pytest.param(2, bytes([0b00_01_10_11]), 1, [0, 255, 170, 255], id="2 bits"),
        # 4 bits: 0, 7, 8, 15 are 0, 119, 136, 255; 7 is clear.
        pytest.param(4, bytes([0x07, 0x8F]), 7, [0, 255, 136, 255], id="4 bits"),
    ],
)
def test_the_clear_grey_of_a_png_with_few_bits_is_white(
    depth: int, row: bytes, clear: int, expected: list[int]
) -> None:
    data = png_file(4, depth, 0, row, struct.pack(">H", clear))
    assert decode(data)[0, :, 0].tolist() == expected


def test_the_clear_colour_of_a_sixteen_bit_png_is_white() -> None:
    row = struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0x1334, 0x5678, 0x9ABC)
    data = png_file(2, 16, 2, row, struct.pack(">3H", 0x1234, 0x5678, 0x9ABC))
    assert decode(data)[0].tolist() == [[255, 255, 255], [0x13, 0x56, 0x9A]]


def test_sixteen_bit_rgb_keeps_its_upper_eight_bits() -> None:
    row = struct.pack(">6H", 65535, 0, 0x80FF, 0x0100, 0x00FF, 0xFE00)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)
    assert decode(data)[0].tolist() == [[255, 0, 0x80], [1, 0, 0xFE]]


def test_a_tiff_in_which_zero_is_white_is_no_negative() -> None:
    for values, dark_to_light in (
        (np.array([[65535, 32639, 0]], np.uint16), [0, 128, 255]),  # (65535 - 32639) / 257 = 128
        (np.array([[255, 127, 0]], np.uint8), [255, 127, 0]),  # of 8 bits Pillow writes what it reads
    ):
        data = encode(Image.fromarray(values), "TIFF", tiffinfo={262: 0})
        assert decode(data)[0, :, 0].tolist() == dark_to_light


@pytest.mark.parametrize(
    ("kind", "transparency", "expected"),
    [
        ("PNG", None, [(255, 0, 0), (0, 255, 0), (0, 0, 255)]),
        # An alpha for every colour: clear, 102 / 255 = 2/5, solid. 0 * 2/5 + 255 * 3/5 = 153
        ("PNG", bytes([0, 102, 255]), [(255, 255, 255), (153, 255, 153), (0, 0, 255)]),
        ("GIF", None, [(255, 0, 0), (0, 255, 0), (0, 0, 255)]),
        ("GIF", 2, [(255, 0, 0), (0, 255, 0), (255, 255, 255)]),
    ],
)
def test_a_palette_is_resolved_and_its_clear_colours_are_white(
    kind: str, transparency: bytes | int | None, expected: list[tuple[int, int, int]]
) -> None:
    options = {} if transparency is None else {"transparency": transparency}
    pixels = decode(encode(palette_picture(), kind, **options))
    assert [tuple(pixel) for pixel in pixels[0].tolist()] == expected


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(kind: str) -> None:
    # 65535 / 257 = 255, 32896 / 257 = 128, 257 -> 1, 128 -> 0.498 -> 0, 129 -> 0.502 -> 1
    picture = Image.fromarray(np.array([[65535, 32896, 257, 128, 129, 0]], np.uint16))
    assert decode(encode(picture, kind))[0, :, 0].tolist() == [255, 128, 1, 0, 1, 0]


def test_every_sixteen_bit_grey_is_rounded_to_the_nearest_level() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    np.testing.assert_array_equal(decode(encode(Image.fromarray(values)))[..., 0], np.rint(values / 257))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_bands_of_any_height_give_the_same_pixels(orientation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [
        encode(picture, exif=exif(orientation))
        for picture in (noise(1, 7, 5, 4), palette_picture().resize((5, 7)), noise(2, 7, 5)[..., 0])
    ]
    whole = [decode(data) for data in pictures]
    for pixels in (1, 10, 15):  # bands of 1, 2 and 3 rows of 5
        monkeypatch.setattr("preprocess.images.decode.BAND_PIXELS", pixels)
        for data, expected in zip(pictures, whole, strict=True):
            np.testing.assert_array_equal(decode(data), expected)


def test_the_clear_grey_of_a_sixteen_bit_png_is_white() -> None:
    plain = encode(Image.fromarray(np.array([[1000, 1001]], np.uint16)))
    place = plain.index(b"IDAT") - 4
    data = plain[:place] + chunk(b"tRNS", struct.pack(">H", 1000)) + plain[place:]
    assert decode(data)[0, :, 0].tolist() == [255, 4]  # 1001 / 257 = 3.9


def test_cmyk_becomes_rgb() -> None:
    cyan_black_white = one_row("CMYK", (255, 0, 0, 0), (0, 0, 0, 255), (0, 0, 0, 0))
    pixels = decode(encode(cyan_black_white, "TIFF"))
    assert [tuple(pixel) for pixel in pixels[0].tolist()] == [(0, 255, 255), (0, 0, 0), (255, 255, 255)]


def test_floating_point_pictures_are_rejected_because_they_have_no_range() -> None:
    data = encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")
    with pytest.raises(ImageError, match="floating-point") as caught:
        decode(data)
    assert caught.value.reason == "image_corrupt"


def test_an_animation_is_its_first_frame() -> None:
    frames = [Image.new("L", (3, 2), level) for level in (40, 200)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert header_of(data) == Header(2, 3)
    assert (decode(data) == 40).all()


@pytest.mark.parametrize(
    ("limit", "allowed", "refused", "reason", "detail"),
    [
        ("max_pixels", 120, 119, "image_too_many_pixels", "12 x 10 pixels, limit 119"),
        ("max_bytes", len(png(10, 12)), 50, "image_too_many_bytes", "bytes, limit 50"),
        ("max_side", 12, 11, "image_side_too_long", "12 x 10 pixels, limit 11"),
        ("min_side", 10, 11, "image_side_too_short", "12 x 10 pixels, limit 11"),
        ("max_aspect", 1.2, 1.19, "image_too_elongated", "12 x 10 pixels, 1.2 : 1, limit 1.19"),
    ],
)
def test_limits_are_exact_and_name_their_reason(
    limit: str, allowed: float, refused: float, reason: str, detail: str
) -> None:
    data = png(10, 12)
    assert header_of(data, ImageLimits(**{limit: allowed})) == Header(10, 12)
    with pytest.raises(ImageError, match=detail) as caught:
        header_of(data, ImageLimits(**{limit: refused}))
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("kind", "enough"),
    # 120 pixels are two thirds of 180, and seven eighths of 137.1.
    [("JPEG2000", 180), ("WEBP", 138), ("PNG", 120)],
)
def test_formats_that_take_more_memory_may_have_fewer_pixels(kind: str, enough: int) -> None:
    data = encode(noise(1, 10, 12), kind)
    assert header_of(data, ImageLimits(max_pixels=enough)) == Header(10, 12)
    with pytest.raises(ImageError, match="12 x 10 pixels, limit 119") as caught:
        header_of(data, ImageLimits(max_pixels=enough - 1))
    assert caught.value.reason == "image_too_many_pixels"


def test_the_pack_holds_the_size_that_it_opens_against_the_limits_and_the_scan() -> None:
    data = png(10, 12)
    load = partial(load_image, data, grid=(10, 12), geometry=PIXELS, config=ImageConfig())
    assert load(size=(10, 12), limits=ImageLimits(max_pixels=120)).shape == (10, 12, 3)
    with pytest.raises(ImageError, match="12 x 10 pixels, limit 119") as caught:
        load(size=(10, 12), limits=ImageLimits(max_pixels=119))
    assert caught.value.reason == "image_too_many_pixels"
    with pytest.raises(ImageError, match="12 x 10 pixels, 10 x 12 in the scan") as caught:
        load(size=(12, 10), limits=LIMITS)
    assert caught.value.reason == "image_corrupt"


def test_a_view_of_a_mapped_file_is_decoded_like_bytes() -> None:
    for data in (png(10, 12), encode(noise(1, 10, 12), "JPEG")):
        np.testing.assert_array_equal(decode(memoryview(data)), decode(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_side": 0}, "max_side must be at least 1"),
        ({"min_side": 20, "max_side": 19}, "max_side 19 is below min_side 20"),
        ({"max_aspect": 0.5}, "max_aspect must be at least 1"),
        ({"max_seconds": 0}, "max_seconds must be above 0"),
    ],
)
def test_a_limit_that_leaves_no_picture_is_an_error(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageLimits(**change)  # type: ignore[arg-type]


def test_a_canvas_beyond_twice_the_limit_is_refused_before_there_is_memory_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the decoder of WebP takes a whole canvas")

    before = Image.MAX_IMAGE_PIXELS
    data = encode(noise(8, 20, 20), "WEBP")
    monkeypatch.setattr(WebPImagePlugin._webp, "WebPAnimDecoder", refuse)
    limits = ImageLimits(max_pixels=199)
    load = partial(load_image, data, size=(20, 20), grid=(20, 20), geometry=PIXELS, config=ImageConfig())
    for read in (lambda: load(limits=limits), lambda: header_of(data, limits)):
        with pytest.raises(ImageError) as caught:
            read()
        assert caught.value.reason == "image_too_many_pixels"
    assert before == Image.MAX_IMAGE_PIXELS is not None  # of others who use Pillow in this process


def test_an_icon_is_refused_because_opening_it_decodes_it() -> None:
    with pytest.raises(ImageError, match="no header of JPEG, PNG") as caught:
        header_of(encode(noise(9, 16, 16), "ICO"))
    assert caught.value.reason == "image_unreadable"


@pytest.mark.parametrize("error", [MemoryError(), OSError(5, "Input/output error")])
def test_a_shortage_of_memory_and_a_failing_disk_are_no_faults_of_the_picture(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    data = png(10, 12)
    with monkeypatch.context() as patch:
        patch.setattr("preprocess.images.decode.opaque", fail)
        with pytest.raises(type(error)):
            decode(data)
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(type(error)):
        header_of(data)


def test_no_bytes_and_no_picture_have_their_own_reasons() -> None:
    for data, reason in ((b"", "image_empty"), (b"<html>404</html>", "image_unreadable")):
        with pytest.raises(ImageError) as caught:
            header_of(data)
        assert caught.value.reason == reason


def test_a_message_about_bytes_is_the_same_in_every_process() -> None:
    with pytest.raises(ImageError) as caught:
        header_of(b"not a picture")
    assert "BytesIO" not in str(caught.value) and "0x" not in str(caught.value)
    assert "13 bytes, first 6e6f742061207069" in str(caught.value)  # "not a pi"


def hostile_pictures(shared_data: Path) -> dict[str, bytes]:
    directory = shared_data / "hostile"
    listed = json.loads((directory / "MANIFEST.json").read_text())
    names = [entry["file"] for entry in listed if entry["file"].startswith("images/")]
    assert len(names) > 40
    return {name.removeprefix("images/"): (directory / name).read_bytes() for name in names}


# What MANIFEST.json says of them, by hand: what cannot be opened, what is too large, what fails in the pixels.
UNREADABLE = {
    "corrupt-header.jpg",
    "broken.png",
    "unknown_compression_method.png",
    "zero_width.gif",
    "negative_size.ppm",
    "zero_height.j2k",
    "png_decompression_dos.png",
    "17000x17000.avif",
    "image_invalid.jpg",
    "hopper.heif",
    "html_404.jpg",
    "decompression_bomb.ico",
}
TOO_LARGE = {
    "decompression_bomb.gif",
    "reallybig.bmp",
    "badwidth.bmp",
    "16384x16384.png",
}
TOO_ELONGATED = {"940x2.png", "one_row_700x1.png", "strip_tall.png", "strip_wide.jpg"}
CORRUPT = {
    "truncated.jpg",
    "truncated.png",
    "truncated_jpeg.jpg",
    "truncated_image.png",
    "broken_data_stream.png",
    "crash-0c7e0e8e11ce787078f00b5b0ca409a167f070e0.tif",
    "crash-2020-10-test.tif",
    "chunk_no_fctl.png",
}


def test_every_hostile_picture_decodes_to_its_header_or_is_rejected_with_the_right_reason(
    shared_data: Path,
) -> None:
    outcomes: dict[str, str] = {}
    for name, data in hostile_pictures(shared_data).items():
        try:
            header = header_of(data)
            pixels = decode(data)  # reached only by what the header passed
            assert pixels.shape == (header.height, header.width, 3), name
            assert pixels.dtype == np.uint8
            outcomes[name] = "decoded"
        except ImageError as error:
            outcomes[name] = error.reason
    expected = {
        name: "image_empty"
        if name == "empty.jpg"
        else "image_unreadable"
        if name in UNREADABLE
        else "image_too_many_pixels"
        if name in TOO_LARGE
        else "image_too_elongated"
        if name in TOO_ELONGATED
        else "image_corrupt"
        if name in CORRUPT
        else "decoded"
        for name in outcomes
    }
    assert outcomes == expected


def test_a_bad_tiff_writes_nothing_to_stderr_and_what_comes_after_it_does(
    shared_data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, data in hostile_pictures(shared_data).items():
        if name.endswith(".tif") and name in CORRUPT:
            with pytest.raises(ImageError):
                decode(data)
    os.write(2, b"next")
    assert capfd.readouterr().err == "next"


def test_garbage_behind_a_jpeg_and_bad_exif_do_not_change_its_pixels(shared_data: Path) -> None:
    pictures = hostile_pictures(shared_data)
    for name in ("trailing_garbage.jpg", "invalid-exif.jpg", "hopper_bad_exif.jpg", "exif_typeerror.jpg"):
        expected = Image.open(io.BytesIO(pictures[name])).convert("RGB")
        np.testing.assert_array_equal(decode(pictures[name]), np.asarray(expected), err_msg=name)


def test_a_header_is_read_without_decoding_a_pixel(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO")
    pictures = {
        **hostile_pictures(shared_data),
        **{kind: encode(noise(3, 16, 16), kind) for kind in formats},
        "turned.png": encode(noise(3, 5, 7), exif=exif(6)),
    }

    def refuse(*_: object) -> None:
        raise AssertionError("a pixel was decoded")

    outcomes: list[dict[str, object]] = []
    for _ in range(2):
        outcome: dict[str, object] = {}
        for name, data in pictures.items():
            try:
                outcome[name] = header_of(data)
            except ImageError as error:
                outcome[name] = error.reason
        outcomes.append(outcome)
        # The second round cannot decode: the same sizes and reasons must come out.
        for owner in (Image.Image, ImageFile.ImageFile):
            monkeypatch.setattr(owner, "load", refuse)
        monkeypatch.setattr(Image, "_getdecoder", refuse)
    assert outcomes[0] == outcomes[1]
    assert outcomes[1]["turned.png"] == Header(7, 5)
    assert [outcomes[1][kind] for kind in formats] == [Header(16, 16)] * 10 + ["image_unreadable"]


@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_a_damaged_picture_is_rejected_or_decoded_whole_and_never_fails_otherwise(damage: str) -> None:
    rng = np.random.default_rng(4)
    sources = [
        encode(noise(5, 30, 20), kind, **options)
        for kind, options in (
            ("JPEG", {}),
            ("JPEG", {"progressive": True}),
            ("PNG", {}),
            ("GIF", {}),
            ("WEBP", {}),
            ("TIFF", {"compression": "tiff_lzw"}),
            ("BMP", {}),
        )
    ]
    for data in sources:
        for _ in range(40):
            broken = bytearray(data)
            if damage == "cut":
                broken = broken[: rng.integers(0, len(data))]
            else:
                places = rng.integers(0, len(data), rng.integers(1, 6))
                for place in places.tolist():
                    broken[place] = rng.integers(0, 256)
            try:
                limits = ImageLimits(max_pixels=10_000)
                header = header_of(bytes(broken), limits)
                assert decode(bytes(broken), limits=limits).shape == (header.height, header.width, 3)
            except ImageError:
                pass


@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    h=st.integers(1, 6),
    w=st.integers(1, 6),
    seed=st.integers(0, 9),
)
def test_a_resize_is_of_exact_size_and_within_a_level_of_pillow(
    name: str, height: int, width: int, h: int, w: int, seed: int
) -> None:
    geometry = Geometry(patch_size=8, merge=1, filter=name)  # type: ignore[arg-type]  # a Literal
    pixels = noise(seed, height, width)
    found = resize(pixels, h, w, geometry)
    assert found.shape == (8 * h, 8 * w, 3) and found.dtype == np.uint8
    levels = np.abs(found - pillow_resized(pixels, 8 * h, 8 * w, name))
    # Each of the two passes may round the other way: one level, and two where both do.
    assert levels.max() <= 2 and (levels == 2).mean() <= 0.01
    if (
        name == "bilinear"
    ):  # no overshoot, so that nothing is clipped between the passes: half a level for each
        planes = torch.tensor(pixels.transpose(2, 0, 1).copy()).double()[None]
        exact = torch.nn.functional.interpolate(planes, size=(8 * h, 8 * w), mode=name, antialias=True)
        assert np.abs(found - exact[0].permute(1, 2, 0).numpy()).max() < 1.05


@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(33, 21), (1, 50), (50, 1), (1, 1)])
def test_a_resize_does_not_depend_on_the_memory_order(name: str, size: tuple[int, int]) -> None:
    pixels = noise(6, *size)
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()
    expected = torch.nn.functional.interpolate(planes, size=(16, 24), mode=name, antialias=True)
    geometry = Geometry(patch_size=8, merge=1, filter=name)  # type: ignore[arg-type]  # a Literal
    for ordered in (pixels, np.asfortranarray(pixels)):
        found = resize(ordered, 2, 3, geometry)
        np.testing.assert_array_equal(found, expected[0].permute(1, 2, 0).numpy())


def test_a_picture_that_has_the_right_size_keeps_every_pixel() -> None:
    pixels = noise(7, 16, 24)
    np.testing.assert_array_equal(resize(pixels, 2, 3, Geometry(patch_size=8, merge=1)), pixels)
