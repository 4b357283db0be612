"""The file of a video: opening it, the stream that is looked at, its limits, and what becomes of errors."""

from __future__ import annotations

import io
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, BinaryIO

from preprocess.config import ImageLimits, VideoConfig
from preprocess.images import ImageError
from shared.errors import UserError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# Demuxers that read one file and nothing else: a playlist may name other files and addresses.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
READ_BYTES = 1 << 17


@dataclass(frozen=True, slots=True)
class OpenVideo:
    """A video within its limits as far as the header tells; no frame decoded yet."""

    container: InputContainer
    stream: VideoStream
    num_bytes: int
    time_base: Fraction


@contextmanager
def open_video(file: BinaryIO, limits: ImageLimits, config: VideoConfig) -> Generator[OpenVideo, None, None]:
    """The video in a file, decoded by one thread: bytes must not depend on the number of cores.

    Raises:
        ImageError: empty, unknown format, without a video stream or a decoder for it, or beyond a limit.
    """
    import av

    num_bytes = file.seek(0, io.SEEK_END)
    if not num_bytes:
        raise ImageError("video_empty", "0 bytes")
    if num_bytes > config.max_bytes:
        raise ImageError("video_too_many_bytes", f"{num_bytes} bytes, limit {config.max_bytes}")
    file.seek(0)
    with reject_video("video_unreadable"):
        container = av.open(
            file, "r", options={"format_whitelist": FORMATS}, metadata_errors="ignore", buffer_size=READ_BYTES
        )
    with container, reject_video("video_unreadable"):
        stream = _stream_of(container)
        context = stream.codec_context
        check_size(context.width, context.height, limits, config)
        # A frame may be larger than the header says. Without "explode" FFmpeg hides damage in what it makes up: of
        # H.264 files with three flipped bits, 13 of 120 are refused, with it 112; of VP9, 5 either way.
        context.options = {"max_pixels": str(config.max_pixels), "err_detect": "explode"}
        context.thread_count = 1
        if stream.time_base is None:
            raise ImageError("video_unreadable", "its stream has no clock")
        yield OpenVideo(container, stream, num_bytes, stream.time_base)


@contextmanager
def reject_video(reason: str) -> Generator[None, None, None]:
    """Whatever FFmpeg does about bad bytes becomes `ImageError(reason)`.

    A file that cannot be read just now and a shortage of memory are no fault of the bytes, and go on.
    """
    from av.error import FFmpegError

    try:
        yield
    except (ImageError, UserError):
        raise
    except FFmpegError as error:
        if isinstance(error, MemoryError):
            raise MemoryError(str(error)) from None
        raise ImageError(reason, f"{type(error).__name__}: {error.strerror}"[:120]) from None
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise ImageError(reason, f"{type(error).__name__}: {error}"[:120]) from None


def _stream_of(container: InputContainer) -> VideoStream:
    """The first stream of moving pictures: covers of albums are video streams too."""
    from av.stream import Disposition

    covers = Disposition.attached_pic | Disposition.timed_thumbnails
    for stream in container.streams.video:
        if stream.disposition & covers:
            continue
        if stream.codec_context is None:  # pyright: ignore[reportUnnecessaryComparison] (its types promise too much)
            raise ImageError("video_codec_missing", "no decoder for its video stream")
        return stream
    kinds = sorted({stream.type for stream in container.streams})
    raise ImageError("video_no_stream", f"streams: {', '.join(kinds) or 'none'}")


def check_size(width: int, height: int, limits: ImageLimits, config: VideoConfig) -> None:
    """Raises: ImageError: pixels as stored that are beyond a limit."""
    size = f"{width} x {height} pixels"
    short, long = min(width, height), max(width, height)
    if short < 1:
        raise ImageError("video_unreadable", size)
    if width * height > config.max_pixels:
        raise ImageError("video_too_many_pixels", f"{size}, limit {config.max_pixels}")
    if short < limits.min_side:
        raise ImageError("video_side_too_short", f"{size}, limit {limits.min_side}")
    if long > limits.max_aspect * short:
        raise ImageError(
            "video_too_elongated", f"{size}, {long / short:.4g} : 1, limit {limits.max_aspect:g}"
        )


def display_size(frame: VideoFrame, stream: VideoStream, turned: bool) -> tuple[int, int]:
    """(height, width) as a player shows it: pixels need not be square, and cameras are held upright."""
    height, width = frame.height, frame.width
    ratio = stream.sample_aspect_ratio
    if ratio is not None and ratio > 0:
        width = max(1, round(width * ratio))
    return (width, height) if turned else (height, width)
