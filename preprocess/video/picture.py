"""A decoded frame as the picture a player shows: RGB of 8 bits, opaque, upright, at its patch grid.

Samples of 10 and 12 bits are rounded to 8. A wide gamut and HDR transfer curves stay as they are: nothing is
tone-mapped, so that HDR looks flat. Transparency lies over the background where the decoder gives it; FFmpeg's
own decoders of VP8 and VP9 do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from preprocess.images import resize
from shared.geometry import Geometry

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

Pixels = npt.NDArray[np.uint8]

# Frames that do not name their colours: those of high definition are BT.709 (1), others BT.601, as players have it.
_UNSPECIFIED, _BT709, _HD_HEIGHT = 2, 1, 720


class Orientation(NamedTuple):
    """What turns stored pixels upright: rows and columns exchanged first, then mirrored."""

    turned: bool = False
    flip_rows: bool = False
    flip_columns: bool = False


def orientation_of(frame: VideoFrame) -> Orientation:
    """From the frame's display matrix, to the nearest quarter turn.

    A stored pixel (x, y) is shown at (a x + c y, b x + d y), y downwards.
    """
    data = cast(Any, frame.side_data).get("DISPLAYMATRIX")
    if data is None:
        return Orientation()
    a, b, _, c, d = np.frombuffer(data, np.int32)[:5].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return Orientation(True, flip_rows=b < 0, flip_columns=c < 0)
    return Orientation(False, flip_rows=d < 0, flip_columns=a < 0)


def to_picture(
    frame: VideoFrame, grid: tuple[int, int], geometry: Geometry, background: tuple[int, int, int]
) -> Pixels:
    """uint8 [h * p, w * p, 3]; `grid` is (h, w) in patches, as displayed."""
    orientation = orientation_of(frame)
    h, w = grid[::-1] if orientation.turned else grid
    # Turned last: the picture is small by now.
    return _upright(resize(_rgb(frame, background), h, w, geometry), orientation)


def _rgb(frame: VideoFrame, background: tuple[int, int, int]) -> Pixels:
    unnamed = frame.colorspace == _UNSPECIFIED and frame.height >= _HD_HEIGHT
    colours = _BT709 if unnamed else None
    if not any(component.is_alpha for component in frame.format.components):
        return _pixels(frame.reformat(format="rgb24", src_colorspace=colours, threads=1))
    layer = _pixels(frame.reformat(format="rgba", src_colorspace=colours, threads=1)).astype(np.uint16)
    alpha, below = layer[..., 3:], np.array(background, np.uint16)
    return ((layer[..., :3] * alpha + below * (255 - alpha) + 127) // 255).astype(np.uint8)


def _pixels(frame: VideoFrame) -> Pixels:
    return cast(Pixels, frame.to_ndarray())


def _upright(pixels_hwc: Pixels, orientation: Orientation) -> Pixels:
    if orientation.turned:
        pixels_hwc = pixels_hwc.transpose(1, 0, 2)
    if orientation.flip_rows:
        pixels_hwc = pixels_hwc[::-1]
    if orientation.flip_columns:
        pixels_hwc = pixels_hwc[:, ::-1]
    return pixels_hwc
