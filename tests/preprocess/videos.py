"""Small videos of known colours, made by PyAV."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
import numpy.typing as npt

# Frame i is grey of this level: far enough apart to be told from each other after lossy coding.
FIRST_LEVEL, STEP = 20, 5
# Of mpeg4, whose default is coarse: the others come out well by themselves.
BIT_RATE = 8_000_000


def greys(count: int, height: int = 32, width: int = 48) -> npt.NDArray[np.uint8]:
    """Frames uint8 [count, H, W, 3]."""
    levels = FIRST_LEVEL + STEP * np.arange(count)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).astype(np.uint8)


def frame_numbers(frames_thwc: npt.NDArray[np.uint8]) -> list[int]:
    """Which frames of `greys` these are. Raises: AssertionError: one is none of them."""
    levels = frames_thwc.reshape(len(frames_thwc), -1).astype(np.float64)
    assert np.ptp(levels, axis=1).max() <= 4, "not grey, or not of one level"
    numbers = (levels.mean(axis=1) - FIRST_LEVEL) / STEP
    assert np.abs(numbers - numbers.round()).max() < 0.45, numbers
    return numbers.round().astype(int).tolist()


def encode_video(
    frames_thwc: npt.NDArray[np.uint8],
    codec: str = "libx264",
    container: str = "mp4",
    *,
    rate: int = 10,
    times: Sequence[int] | None = None,
    pixel_format: str = "yuv420p",
    key_every: int = 12,
    matrix: Sequence[int] | None = None,
    aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    **conversion: Any,
) -> bytes:
    """An encoded video; `times` are those of the frames in 1 / rate seconds."""
    file = io.BytesIO()
    # Its vector code writes beyond pictures below 64 pixels (x265 of PyAV 18.1): the process aborts now and then.
    settings = {"x265-params": "log-level=none:no-asm=1"} if codec == "libx265" else {}
    with av.open(file, "w", format=container, container_options=container_options) as output:
        stream = output.add_stream(codec, rate=rate, options={**settings, **(options or {})})
        stream.height, stream.width = frames_thwc.shape[1:3]
        stream.pix_fmt, stream.gop_size = pixel_format, key_every
        if codec == "mpeg4":
            stream.bit_rate = BIT_RATE
        if aspect is not None:
            stream.sample_aspect_ratio = aspect
        if matrix is not None:
            stream.set_display_matrix(matrix)
        for number, pixels in enumerate(frames_thwc):
            layout = "rgba" if pixels.shape[-1] == 4 else "rgb24"
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=layout)
            if layout != pixel_format:
                frame = frame.reformat(format=pixel_format, **conversion)
            frame.pts, frame.time_base = (times[number] if times else number), Fraction(1, rate)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def encode_sound() -> bytes:
    """An mp4 of one tenth of a second of silence."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 8000, 0
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()
