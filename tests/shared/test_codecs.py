"""Codecs: what is encoded comes back, small enough, or is refused; never wrong pixels."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shared import codecs
from shared.codecs import (
    FrameError,
    ImageEncoder,
    codec_settings,
    image_decoder,
    image_encoder,
    store_patches,
)
from shared.errors import UserError
from shared.geometry import Geometry, patchify, unpatchify
from shared.schema import IMAGE_DTYPE

ENCODED = ("zstd", "jpeg")


def geometry_of(merge: int = 2, pt: int = 1, p: int = 16) -> Geometry:
    return Geometry(patch_size=p, merge=merge, temporal_patch_size=pt, max_patches_per_image=8192)


def encoder(codec: str, geometry: Geometry, *, jpeg_quality: int = 95, zstd_level: int = 1) -> ImageEncoder:
    encode = image_encoder(codec, geometry, jpeg_quality=jpeg_quality, zstd_level=zstd_level)
    assert encode is not None
    return encode


def decoded(codec: str, geometry: Geometry, frame: bytes, t: int, h: int, w: int) -> np.ndarray:
    """Into memory that is not zero, so that a place left out shows."""
    decode = image_decoder(codec, geometry)
    assert decode is not None
    out = np.full((t * h * w, geometry.values_per_patch), 77, np.uint8)
    decode(np.frombuffer(frame, np.uint8), t, h, w, out)
    return out


def to_patches(pictures: np.ndarray, geometry: Geometry) -> np.ndarray:
    """uint8 [T, h*p, w*p, 3] -> [t*h*w, P]"""
    return np.ascontiguousarray(patchify(pictures, geometry)).reshape(-1, geometry.values_per_patch)


def smooth(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Slopes, an edge and a little noise: what a photograph is made of."""
    generator = np.random.default_rng(seed)
    y, x, c = np.arange(height)[:, None, None], np.arange(width)[:, None], np.arange(3)
    waves = 120 + 60 * np.sin(x / 11 + c / 5 + seed) + 50 * np.cos(y / 17) + 20 * (x > width // 2)
    drift = np.arange(frames)[:, None, None, None] * 3
    noise = generator.normal(0, 1.5, (frames, height, width, 3))
    return np.clip(waves + drift + noise, 0, 255).astype(np.uint8)


def noise(frames: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (frames, height, width, 3), np.uint8)


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((found.astype(np.float64) - expected) ** 2)))


CONTENTS = {
    "noise": noise,
    "photograph": smooth,
    "black": lambda *shape: np.zeros((*shape, 3), np.uint8),
    "white": lambda *shape: np.full((*shape, 3), 255, np.uint8),
    "checkers": lambda *shape: np.indices((*shape, 3)).sum(0).astype(np.uint8) % 2 * 255,
}

# zstd


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize(("t", "pt", "h", "w"), [(1, 1, 2, 2), (1, 1, 4, 6), (1, 2, 6, 2), (3, 2, 2, 4)])
def test_zstd_gives_every_bit_back(content: str, merge: int, t: int, pt: int, h: int, w: int) -> None:
    geometry = geometry_of(merge, pt, p=6)
    patches = to_patches(CONTENTS[content](t * pt, h * 6, w * 6), geometry)
    frame = encoder("zstd", geometry)(patches, t, h, w)
    assert np.array_equal(decoded("zstd", geometry, frame, t, h, w), patches)


@given(
    st.tuples(*(st.integers(1, n) for n in (3, 2, 3, 3, 3, 5))),
    st.integers(0, 2**32 - 1),
    st.integers(1, 256),
    st.integers(1, 19),
)
@settings(max_examples=60, deadline=None)
def test_zstd_gives_back_pictures_of_any_shape_and_content(
    shape: tuple[int, ...], seed: int, colours: int, level: int
) -> None:
    t, pt, merge, cells_h, cells_w, p = shape
    geometry, h, w = geometry_of(merge, pt, p), cells_h * merge, cells_w * merge
    # Few colours make equal neighbours and equal frames, many make wrap-around.
    pictures = np.random.default_rng(seed).integers(0, colours, (t * pt, h * p, w * p, 3), np.uint8)
    patches = to_patches(pictures, geometry)
    frame = encoder("zstd", geometry, zstd_level=level)(patches, t, h, w)
    assert np.array_equal(decoded("zstd", geometry, frame, t, h, w), patches)


def residuals_ref(picture: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> [3, H, W]: the predictor value by value, as its description has it."""
    r, g, b = (picture[..., c].astype(int) for c in range(3))
    planes = np.stack([g, (r - g + 128) % 256, (b - g + 128) % 256])
    residuals = np.zeros(planes.shape, np.uint8)
    for c, y, x in np.ndindex(planes.shape):
        start = 128 if c else 0  # what lies above the first row; left of a row lies what is above it
        up = planes[c, y - 1, x] if y else start
        left = planes[c, y, x - 1] if x else up
        corner = up if x == 0 else planes[c, y - 1, x - 1] if y else start
        guess = int(np.median([left, up, left + up - corner]))
        residuals[c, y, x] = (planes[c, y, x] - guess) % 256
    return residuals


@pytest.mark.parametrize("merge", [1, 2])
def test_a_zstd_frame_is_a_standard_one_of_the_residuals_that_the_description_gives(merge: int) -> None:
    geometry = geometry_of(merge, p=3)
    picture = noise(1, 12, 18)
    frame = encoder("zstd", geometry)(to_patches(picture, geometry), 1, 4, 6)
    assert zstandard.get_frame_parameters(frame).has_checksum
    assert zstandard.decompress(frame) == residuals_ref(picture[0]).tobytes()


def test_a_frame_like_the_one_before_costs_next_to_nothing() -> None:
    # A still picture fills both frames of its temporal patch.
    still = smooth(1, 128, 128)
    for codec in ENCODED:
        once = encoder(codec, geometry_of(pt=1))(to_patches(still, geometry_of(pt=1)), 1, 8, 8)
        geometry = geometry_of(pt=2)
        patches = to_patches(np.repeat(still, 2, axis=0), geometry)
        twice = encoder(codec, geometry)(patches, 1, 8, 8)
        assert len(twice) < 1.02 * len(once), codec
        frames = unpatchify(decoded(codec, geometry, twice, 1, 8, 8), 1, 8, 8, geometry)
        assert np.array_equal(frames[0], frames[1])


def test_the_part_of_a_video_that_stands_still_is_not_stored_again() -> None:
    geometry = geometry_of()
    still, moving = smooth(1, 64, 64), smooth(1, 64, 64)
    moving[0, :16] = noise(1, 16, 64)
    encode = encoder("zstd", geometry)
    first, second, both = (
        len(encode(to_patches(video, geometry), len(video), 4, 4))
        for video in (still, moving, np.concatenate([still, moving]))
    )
    # A quarter of the second frame is noise, which nothing makes smaller: 3,072 bytes of about 7,000.
    assert both - first < 0.7 * second


# jpeg


@pytest.mark.parametrize(("quality", "least_db"), [(95, 40.0), (75, 33.0)])
def test_jpeg_keeps_the_picture_within_a_distance_that_its_quality_sets(
    quality: int, least_db: float
) -> None:
    for merge, pt, t in ((1, 1, 1), (2, 1, 1), (2, 2, 2)):
        geometry = geometry_of(merge, pt)
        patches = to_patches(smooth(t * pt, 64, 96), geometry)
        frame = encoder("jpeg", geometry, jpeg_quality=quality)(patches, t, 4, 6)
        assert least_db < psnr(decoded("jpeg", geometry, frame, t, 4, 6), patches) < 60


def test_a_jpeg_frame_of_one_picture_is_a_444_jpeg_behind_eight_bytes() -> None:
    geometry = geometry_of()
    picture = smooth(1, 64, 96)
    frame = encoder("jpeg", geometry, jpeg_quality=90)(to_patches(picture, geometry), 1, 4, 6)
    assert int.from_bytes(frame[:4], "little") == len(frame) - 8
    opened = Image.open(io.BytesIO(frame[8:]))
    assert (opened.format, opened.size) == ("JPEG", (96, 64))
    # (identifier, horizontal, vertical, table): no channel is sampled coarser than another.
    assert [layer[1:3] for layer in opened.layer] == [(1, 1)] * 3  # pyright: ignore
    again = io.BytesIO()
    Image.fromarray(picture[0]).save(again, "JPEG", quality=90, subsampling=0)
    assert opened.quantization == Image.open(again).quantization  # pyright: ignore
    # Another decoder, the same pixels.
    found = unpatchify(decoded("jpeg", geometry, frame, 1, 4, 6), 1, 4, 6, geometry)[0]
    assert np.abs(found.astype(int) - np.asarray(opened)).max() <= 1


@given(st.tuples(*(st.integers(1, n) for n in (3, 2, 3, 3, 3, 20))), st.integers(0, 255), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_jpeg_takes_pictures_of_any_shape(shape: tuple[int, ...], grey: int, step: int) -> None:
    t, pt, merge, cells_h, cells_w, p = shape
    geometry, h, w = geometry_of(merge, pt, p), cells_h * merge, cells_w * merge
    # Each picture is of one grey, so that blocks that straddle patches or frames would show.
    greys = (grey + step * np.arange(t * pt)) % 256
    pictures = np.broadcast_to(greys[:, None, None, None], (t * pt, h * p, w * p, 3)).astype(np.uint8)
    patches = to_patches(pictures, geometry)
    found = decoded("jpeg", geometry, encoder("jpeg", geometry)(patches, t, h, w), t, h, w)
    assert np.abs(found.astype(int) - patches).max() <= 2


def test_colours_are_not_swapped_on_the_way() -> None:
    geometry = geometry_of()
    colour = np.array([250, 120, 10], np.uint8)
    patches = np.tile(colour, (4, geometry.values_per_patch // 3))
    frame = encoder("jpeg", geometry)(patches, 1, 2, 2)
    assert np.abs(decoded("jpeg", geometry, frame, 1, 2, 2).reshape(-1, 3).astype(int) - colour).max() <= 3


@pytest.mark.parametrize(("h", "w"), [(1, 4097), (4097, 1)])
def test_pictures_beyond_the_side_that_jpeg_allows_are_cut_and_put_together(h: int, w: int) -> None:
    geometry = geometry_of(merge=1)
    picture = smooth(1, h * 16, w * 16)
    assert max(picture.shape) > 65_500
    with pytest.raises(ValueError, match="dimension"):
        simplejpeg.encode_jpeg(picture[0])
    patches = to_patches(picture, geometry)
    frame = encoder("jpeg", geometry)(patches, 1, h, w)
    assert psnr(decoded("jpeg", geometry, frame, 1, h, w), patches) > 40


def test_tiles_of_a_video_repeat_and_change_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tiles of 32 x 32 pixels: 2 x 3 of them, and only the last one changes.
    monkeypatch.setattr(codecs, "MAX_JPEG_SIDE", 32)
    geometry = geometry_of(merge=1)
    video = np.repeat(smooth(1, 64, 80), 3, axis=0)
    video[1:, 32:, 64:] = smooth(2, 32, 16, seed=5)
    patches = to_patches(video, geometry)
    frame = encoder("jpeg", geometry)(patches, 3, 4, 5)
    stored = np.frombuffer(frame[: 3 * 6 * 8], "<u4").reshape(3, 6, 2)[..., 0] > 0
    assert stored.tolist() == [[True] * 6, [False] * 5 + [True], [False] * 5 + [True]]
    assert psnr(decoded("jpeg", geometry, frame, 3, 4, 5), patches) > 38


# What a frame is worth


@pytest.fixture(scope="module")
def photographs(shared_data: Path) -> list[np.ndarray]:
    """The JPEG photographs of the test data, at most 512 pixels a side, cut to whole cells."""
    found: list[np.ndarray] = []
    with tarfile.open(shared_data / "photos" / "photos-jpeg-000000.tar") as tar:
        for member in itertools.islice((m for m in tar if m.name.endswith(".jpg")), 20):
            file = tar.extractfile(member)
            assert file is not None
            picture = Image.open(file).convert("RGB")
            picture.thumbnail((512, 512), Image.Resampling.BILINEAR)
            pixels = np.asarray(picture)
            found.append(pixels[: len(pixels) // 32 * 32, : pixels.shape[1] // 32 * 32][None].copy())
    return found


def test_photographs_take_as_little_as_the_format_promises(photographs: list[np.ndarray]) -> None:
    geometry = geometry_of()
    raw = sum(picture.nbytes for picture in photographs)
    size = dict.fromkeys(ENCODED, 0)
    for picture in photographs:
        patches, h, w = to_patches(picture, geometry), picture.shape[1] // 16, picture.shape[2] // 16
        for codec in ENCODED:
            frame = encoder(codec, geometry)(patches, 1, h, w)
            size[codec] += len(frame)
            if codec == "zstd":
                assert np.array_equal(decoded(codec, geometry, frame, 1, h, w), patches)
    assert raw / size["zstd"] > 2.2
    assert size["jpeg"] / (raw / 768) < 130


def test_residuals_take_less_than_with_the_tables_of_zstandard(photographs: list[np.ndarray]) -> None:
    geometry, ours, theirs = geometry_of(), 0, 0
    for picture in photographs[:5]:
        patches, h, w = to_patches(picture, geometry), picture.shape[1] // 16, picture.shape[2] // 16
        frame = encoder("zstd", geometry)(patches, 1, h, w)
        ours += len(frame)
        theirs += len(zstandard.ZstdCompressor(level=1).compress(zstandard.decompress(frame)))
    assert ours < 0.99 * theirs


# Damage


@pytest.mark.parametrize("codec", ENCODED)
@pytest.mark.parametrize("pt", [1, 2])
def test_a_flipped_bit_anywhere_in_a_frame_is_found(codec: str, pt: int) -> None:
    geometry = geometry_of(pt=pt, p=4)
    patches = to_patches(smooth(pt, 8, 8), geometry)
    frame = encoder(codec, geometry)(patches, 1, 2, 2)
    whole = decoded(codec, geometry, frame, 1, 2, 2)
    missed: list[int] = []
    for place in range(len(frame)):
        spoiled = bytearray(frame)
        spoiled[place] ^= 0x04
        try:
            if not np.array_equal(decoded(codec, geometry, bytes(spoiled), 1, 2, 2), whole):
                missed.append(place)
        except FrameError:
            continue
    assert missed == []


@pytest.mark.parametrize("codec", ENCODED)
def test_a_frame_of_another_length_is_refused(codec: str) -> None:
    geometry = geometry_of(p=4)
    frame = encoder(codec, geometry)(to_patches(smooth(1, 8, 8), geometry), 1, 2, 2)
    for other in (b"", frame[:5], frame[:-1], frame + b"\0", frame + frame):
        with pytest.raises(FrameError):
            decoded(codec, geometry, other, 1, 2, 2)


@pytest.mark.parametrize("codec", ENCODED)
@pytest.mark.parametrize(
    "grid", [(1, 4, 2), (1, 2, 4), (2, 2, 2), (1, 4, 4), (1, 3, 2), (0, 2, 2), (1, 2, -2)]
)
def test_a_frame_is_refused_where_another_grid_is_expected(codec: str, grid: tuple[int, int, int]) -> None:
    geometry = geometry_of(p=4)
    frame = encoder(codec, geometry)(to_patches(smooth(1, 8, 8), geometry), 1, 2, 2)
    decode = image_decoder(codec, geometry)
    assert decode is not None
    out = np.empty((max(0, int(np.prod(grid))), geometry.values_per_patch), np.uint8)
    with pytest.raises(FrameError):
        decode(np.frombuffer(frame, np.uint8), *grid, out)


def test_a_place_that_does_not_fit_is_refused_before_anything_is_written() -> None:
    geometry = geometry_of(p=4)
    frame = np.frombuffer(encoder("zstd", geometry)(to_patches(smooth(1, 8, 8), geometry), 1, 2, 2), np.uint8)
    decode = image_decoder("zstd", geometry)
    assert decode is not None
    for out in (np.zeros((3, 48), np.uint8), np.zeros((4, 48), np.int8), np.zeros((4, 96), np.uint8)[:, ::2]):
        with pytest.raises(FrameError, match="the place for it is"):
            decode(frame, 1, 2, 2, out)
        assert not out.any()


# Around the codecs


@pytest.mark.parametrize("codec", ENCODED)
def test_threads_share_a_decoder(codec: str) -> None:
    geometry = geometry_of()
    images = [to_patches(smooth(1, 64, 96, seed), geometry) for seed in range(16)]
    frames = [encoder(codec, geometry)(patches, 1, 4, 6) for patches in images]
    alone = [decoded(codec, geometry, frame, 1, 4, 6) for frame in frames]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda frame: decoded(codec, geometry, frame, 1, 4, 6), frames))
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("codec", codecs.CODECS)
def test_what_is_stored_for_a_pack_is_its_images_one_after_another(codec: str) -> None:
    geometry = geometry_of(p=4)
    images = np.zeros(2, IMAGE_DTYPE)
    images["t"], images["h"], images["w"] = 1, [2, 4], [2, 6]
    pictures = [smooth(1, 8, 8), smooth(1, 16, 24, seed=1)]
    patches = [to_patches(picture, geometry) for picture in pictures]
    encode = image_encoder(codec, geometry, jpeg_quality=95, zstd_level=1)
    stored = store_patches(np.concatenate(patches), images, encode)
    frames = [
        one.tobytes() if encode is None else encode(one, 1, h, w)
        for one, h, w in zip(patches, (2, 4), (2, 6), strict=True)
    ]
    assert stored.tobytes() == b"".join(frames)
    assert images["nbytes"].tolist() == [len(frame) for frame in frames]


def test_a_pack_without_images_stores_nothing() -> None:
    geometry = geometry_of(p=4)
    for codec in codecs.CODECS:
        encode = image_encoder(codec, geometry, jpeg_quality=95, zstd_level=1)
        assert store_patches(np.empty((0, 48), np.uint8), np.zeros(0, IMAGE_DTYPE), encode).nbytes == 0


def test_raw_has_neither_encoder_nor_decoder() -> None:
    assert image_encoder("raw", geometry_of(), jpeg_quality=95, zstd_level=1) is None
    assert image_decoder("raw", geometry_of()) is None


def test_only_the_settings_that_a_codec_reads_are_named() -> None:
    found = [codec_settings(codec, jpeg_quality=90, zstd_level=3) for codec in codecs.CODECS]
    assert found == [{}, {"zstd_level": 3}, {"jpeg_quality": 90}]


@pytest.mark.parametrize(
    ("codec", "library"), [("zstd", "zstandard"), ("zstd", "numba"), ("jpeg", "simplejpeg")]
)
def test_a_library_that_is_not_installed_is_named_with_what_to_install(
    codec: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        UserError, match=rf"codec '{codec}' needs {library}.*pip install 'parquetry\[codecs\]'"
    ):
        image_decoder(codec, geometry_of())
    assert image_decoder("raw", geometry_of()) is None


def test_a_raw_data_set_imports_none_of_the_libraries() -> None:
    program = (
        "import sys, trainer.data.loader, shared.dataset, shared.codecs; from shared.geometry import Geometry; "
        "shared.codecs.image_decoder('raw', Geometry()); "
        "print({'numba', 'zstandard', 'simplejpeg'} & sys.modules.keys())"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
