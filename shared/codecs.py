"""Codecs of the patch column: how one image's patches are stored. One frame per image, back to back.

    raw    the patches themselves; mapped, nothing to decode
    zstd   lossless: colour and spatial prediction (`predictor`), then Zstandard with its content checksum
    jpeg   the resized picture again, as 4:4:4 JPEG of a set quality

A frame holds all t * pt pictures of its image, each h*p x w*p pixels:

    zstd   one Zstandard frame of: one flag per picture after the first; residuals [t*pt, 3, h*p, w*p].
           Flag 1: the residuals are differences from those of the picture before (a still picture fills all
           frames of its patch; much of a screen recording does not move).
    jpeg   _TILE per tile, then the JPEG streams in the same order: pictures, rows of tiles, columns of tiles.
           Nearly every picture is one tile; sides beyond JPEG's limit are cut. A tile of 0 bytes is the same as
           in the picture before.

Decoding writes into the place given and keeps no state, so threads share a decoder; the heavy parts release
the interpreter lock. A frame that is not what was written raises FrameError, it never yields wrong pixels.
The libraries are imported when the first encoder or decoder is made: a raw data set needs none of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from shared.errors import UserError
from shared.geometry import CHANNELS, Geometry, patchify, unpatchify

CODECS = ("raw", "zstd", "jpeg")
LIBRARIES = {"raw": (), "zstd": ("numba", "zstandard"), "jpeg": ("simplejpeg",)}

MAX_ZSTD_LEVEL = 19
# Tiles are cut here: the last multiple of 16 pixels below the 65,500 that JPEG libraries take.
MAX_JPEG_SIDE = 65_488
_TILE = np.dtype([("nbytes", "<u4"), ("xxh32", "<u4")])

Bytes = npt.NDArray[np.uint8]
ImageEncoder = Callable[[Bytes, int, int, int], bytes]
"""(patches [t*h*w, P], t, h, w) -> one frame"""


class FrameError(Exception):
    """A frame is not what the encoder made; the message says how."""


@dataclass(frozen=True, slots=True)
class ImageDecoder:
    """Frames of one data set -> patches. Safe to share between threads."""

    geometry: Geometry
    decode_frame: Callable[[Bytes, int, int, int, Bytes], None]

    def __call__(self, frame: Bytes, t: int, h: int, w: int, out: Bytes) -> None:
        """Write one image's patches into `out`, uint8 [t*h*w, P], contiguous.

        Raises:
            FrameError: the frame is damaged, or of another size than t x h x w patches.
        """
        expected, m = (t * h * w, self.geometry.values_per_patch), self.geometry.merge
        if min(t, h, w) < 1 or h % m or w % m:
            raise FrameError(f"a grid of {t} x {h} x {w} patches is not one of merge {m}")
        # The compiled loops check no bounds.
        if out.shape != expected or out.dtype != np.uint8 or not out.flags.c_contiguous:
            raise FrameError(f"the place for it is {out.dtype}{list(out.shape)}, not uint8{list(expected)}")
        self.decode_frame(frame, t, h, w, out)


def image_encoder(
    codec: str, geometry: Geometry, *, jpeg_quality: int, zstd_level: int
) -> ImageEncoder | None:
    """The encoder of a codec; None for raw, whose patches are stored as they are.

    Raises:
        UserError: a library of the codec is not installed.
    """
    require_libraries(codec)
    if codec == "zstd":
        return partial(_encode_zstd, geometry, zstd_level)
    if codec == "jpeg":
        return partial(_encode_jpeg, geometry, jpeg_quality)
    return None


def image_decoder(codec: str, geometry: Geometry) -> ImageDecoder | None:
    """The decoder of a codec; None for raw.

    Raises:
        UserError: a library of the codec is not installed.
    """
    require_libraries(codec)
    if codec == "raw":
        return None
    return ImageDecoder(geometry, partial(_decode_zstd if codec == "zstd" else _decode_jpeg, geometry))


def codec_settings(codec: str, *, jpeg_quality: int, zstd_level: int) -> dict[str, int]:
    """The settings that the codec reads. They change stored bytes, but nothing that two data sets must share."""
    return {"zstd": {"zstd_level": zstd_level}, "jpeg": {"jpeg_quality": jpeg_quality}}.get(codec, {})


def store_patches(patches_XP: Bytes, images: npt.NDArray[Any], encode: ImageEncoder | None) -> Bytes:
    """What the patch column holds for a pack; sets `images["nbytes"]` (IMAGE_DTYPE) to match."""
    counts = images["t"].astype(np.int64) * images["h"] * images["w"]
    if encode is None:
        images["nbytes"] = counts * patches_XP.shape[1]
        return patches_XP
    ends = np.cumsum(counts)
    grids = zip(*(images[name].tolist() for name in ("t", "h", "w")), strict=True)
    spans = zip((ends - counts).tolist(), ends.tolist(), strict=True)
    frames = [encode(patches_XP[start:end], *grid) for (start, end), grid in zip(spans, grids, strict=True)]
    images["nbytes"] = [len(frame) for frame in frames]
    return np.frombuffer(b"".join(frames), np.uint8)


def require_libraries(codec: str) -> None:
    """Import what a codec needs; UserError where that is not installed."""
    for name in LIBRARIES[codec]:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"codec {codec!r} needs {name}, which cannot be imported ({error}); "
                f"install it with pip install 'parquetry[codecs]'"
            ) from None


# zstd


def _encode_zstd(geometry: Geometry, level: int, patches: Bytes, t: int, h: int, w: int) -> bytes:
    import zstandard

    from shared.predictor import predict

    pictures, p = t * geometry.temporal_patch_size, geometry.patch_size
    payload = np.empty(pictures - 1 + patches.size, np.uint8)
    flags = payload[: pictures - 1]
    residuals = payload[pictures - 1 :].reshape(pictures, CHANNELS, h * p, w * p)
    predict(np.ascontiguousarray(patches), residuals, h, w, geometry.merge, p)
    for picture in range(pictures - 1, 0, -1):
        difference = residuals[picture] - residuals[picture - 1]
        flags[picture - 1] = _magnitude(difference) < _magnitude(residuals[picture])
        if flags[picture - 1]:
            residuals[picture] = difference
    parameters = _zstd_parameters(level, payload.size)
    return zstandard.ZstdCompressor(compression_params=parameters).compress(payload.data)


def _magnitude(residuals: Bytes) -> int:
    """Sum of the distances to 0, modulo 256."""
    return int(np.minimum(residuals, np.negative(residuals)).sum(dtype=np.int64))


def _zstd_parameters(level: int, num_bytes: int) -> Any:
    from zstandard import STRATEGY_FAST, ZstdCompressionParameters

    own = ZstdCompressionParameters.from_level(level, source_size=num_bytes)
    # Repeats among residuals are chance, and naming one costs more than the bytes it saves: the smallest table
    # finds the long runs that pay, and leaves the rest to the entropy coder (benchmarks/codecs.py: smaller, faster).
    table = {"hash_log": 6} if own.strategy == STRATEGY_FAST else {}
    return ZstdCompressionParameters.from_level(
        level, source_size=num_bytes, write_checksum=True, write_content_size=True, **table
    )


def _decode_zstd(geometry: Geometry, frame: Bytes, t: int, h: int, w: int, out: Bytes) -> None:
    import zstandard

    from shared.predictor import restore

    pictures, p = t * geometry.temporal_patch_size, geometry.patch_size
    expected = pictures - 1 + out.size
    try:
        header = zstandard.get_frame_parameters(frame.data)
        if header.content_size != expected or not header.has_checksum:
            raise FrameError(f"its Zstandard frame holds {header.content_size} bytes, expected {expected}")
        payload = np.frombuffer(
            zstandard.ZstdDecompressor().decompress(frame.data, allow_extra_data=False), np.uint8
        )
    except zstandard.ZstdError as error:
        raise FrameError(f"its Zstandard frame is damaged ({error})") from None
    residuals = payload[pictures - 1 :].reshape(pictures, CHANNELS, h * p, w * p)
    differences = np.flatnonzero(payload[: pictures - 1])
    if len(differences):
        residuals = residuals.copy()
        for picture in differences.tolist():
            residuals[picture + 1] += residuals[picture]
    restore(out, residuals, h, w, geometry.merge, p)


# jpeg


def _tiles(height: int, width: int) -> Iterator[tuple[slice, slice]]:
    """The parts of a picture that are JPEG streams of their own: nearly always one."""
    for y in range(0, height, MAX_JPEG_SIDE):
        for x in range(0, width, MAX_JPEG_SIDE):
            yield slice(y, min(y + MAX_JPEG_SIDE, height)), slice(x, min(x + MAX_JPEG_SIDE, width))


def _encode_jpeg(geometry: Geometry, quality: int, patches: Bytes, t: int, h: int, w: int) -> bytes:
    import simplejpeg

    pictures = unpatchify(patches, t, h, w, geometry)
    tiles = list(_tiles(*pictures.shape[1:3]))
    table = np.zeros((len(pictures), len(tiles)), _TILE)
    streams: list[bytes] = []
    for number, picture in enumerate(pictures):
        for place, tile in enumerate(tiles):
            if number and np.array_equal(picture[tile], pictures[number - 1][tile]):
                continue
            stream = simplejpeg.encode_jpeg(
                np.ascontiguousarray(picture[tile]), quality=quality, colorspace="RGB", colorsubsampling="444"
            )
            table[number, place] = len(stream), xxhash.xxh32_intdigest(stream)
            streams.append(stream)
    return b"".join([table.tobytes(), *streams])


def _decode_jpeg(geometry: Geometry, frame: Bytes, t: int, h: int, w: int, out: Bytes) -> None:
    num_pictures, p = t * geometry.temporal_patch_size, geometry.patch_size
    pictures = np.empty((num_pictures, h * p, w * p, CHANNELS), np.uint8)
    tiles = list(_tiles(h * p, w * p))
    table_bytes = num_pictures * len(tiles) * _TILE.itemsize
    if len(frame) < table_bytes:
        raise FrameError(
            f"it has {len(frame)} bytes, too few for its {num_pictures * len(tiles)} JPEG streams"
        )
    table = frame[:table_bytes].view(_TILE).reshape(num_pictures, len(tiles))
    ends = table_bytes + np.cumsum(table["nbytes"], dtype=np.int64).reshape(table.shape)
    if ends[-1, -1] != len(frame) or not table["nbytes"][0].all():
        raise FrameError(f"it has {len(frame)} bytes, its table of JPEG streams says {int(ends[-1, -1])}")
    for number in range(num_pictures):
        for place, tile in enumerate(tiles):
            nbytes, checksum = table[number, place].tolist()
            target = pictures[number][tile]
            if not nbytes:
                target[...] = pictures[number - 1][tile]
                continue
            end = int(ends[number, place])
            _decode_stream(frame[end - nbytes : end], checksum, target)
    view = patchify(pictures, geometry)
    out.reshape(view.shape)[...] = view


def _decode_stream(stream: Bytes, checksum: int, out_hwc: Bytes) -> None:
    import simplejpeg

    if (found := xxhash.xxh32_intdigest(stream.data)) != checksum:
        raise FrameError(f"a JPEG stream has checksum {found:08x}, expected {checksum:08x}")
    try:
        header = simplejpeg.decode_jpeg_header(stream.data)
        if header != (*out_hwc.shape[:2], "YCbCr", "444"):
            raise FrameError(f"a JPEG stream is {header}, expected {out_hwc.shape[:2]} in YCbCr 4:4:4")
        if out_hwc.flags.c_contiguous:
            simplejpeg.decode_jpeg(stream.data, colorspace="RGB", buffer=out_hwc)
        else:
            out_hwc[...] = simplejpeg.decode_jpeg(stream.data, colorspace="RGB")
    except ValueError as error:
        raise FrameError(f"a JPEG stream cannot be decoded ({error})") from None
