"""What is known of a video before it is decoded: size as displayed, length, number of frames.

mp4, mov and avi hold a table of their frames, and little more is read of them than that and one frame, which says
what no header does: that it can be decoded, and which way up it is. Files without such a table (webm, mkv,
fragmented mp4) are read through, their packets counted and not decoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, BinaryIO

from preprocess.config import ImageLimits, VideoConfig
from preprocess.images import ImageError
from preprocess.video.container import OpenVideo, check_size, display_size, open_video, reject_video
from preprocess.video.picture import orientation_of

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.frame import VideoFrame

# Beyond it a file is read through no further.
MAX_FRAMES = 1 << 20
# How much a file may end before the length that its header tells: streams do not end at the same instant.
SLACK_SECONDS = Fraction(1, 2)


@dataclass(frozen=True, slots=True)
class VideoHeader:
    """Size in pixels as displayed, length in seconds, number of frames."""

    height: int
    width: int
    duration: Fraction
    frames: int


def read_video_header(file: BinaryIO, *, limits: ImageLimits, config: VideoConfig) -> VideoHeader:
    """
    Raises:
        ImageError: not a video, beyond a limit, cut off, or its first frame cannot be decoded.
    """
    with open_video(file, limits, config) as video:
        told = _told_length(video)
        if told is not None:
            check_length(told[0], config)
            frame = _first_frame(video)
            duration, frames = told
        else:
            frame, duration, frames = _read_through(video)
            check_length(duration, config)
        check_size(frame.width, frame.height, limits, config)
        height, width = display_size(frame, video.stream, orientation_of(frame).turned)
        return VideoHeader(height, width, duration, frames)


def check_length(duration: Fraction, config: VideoConfig) -> None:
    """Raises: ImageError: longer than the limit."""
    if duration > config.max_seconds_of_video:
        raise ImageError(
            "video_too_long", f"{float(duration):.1f} s, limit {config.max_seconds_of_video:g} s"
        )


def _told_length(video: OpenVideo) -> tuple[Fraction, int] | None:
    """Seconds and frames as the file's table has them; None where it has none.

    Raises:
        ImageError: the file ends before its last frame.
    """
    stream, container = video.stream, video.container
    if stream.frames <= 0 or not stream.duration or stream.duration < 0:
        return None
    entries = stream.index_entries
    if not len(entries):
        return None
    last = entries[len(entries) - 1]
    if last.pos + last.size > video.num_bytes:
        raise ImageError(
            "video_truncated", f"{video.num_bytes} bytes, its last frame ends at {last.pos + last.size}"
        )
    if container.format.name == "avi" and len(entries) < stream.frames:
        raise ImageError("video_truncated", f"{len(entries)} frames, {stream.frames} in its header")
    duration = stream.duration * video.time_base
    if container.duration is not None and container.duration > 0:
        # An edit list shows less than there is.
        duration = min(duration, Fraction(container.duration, 1_000_000))
    return duration, stream.frames


def _first_frame(video: OpenVideo) -> VideoFrame:
    with reject_video("video_corrupt"):
        for packet in video.container.demux(video.stream):
            for frame in packet.decode():
                return frame
    raise ImageError("video_no_frames", "nothing to decode")


def _read_through(video: OpenVideo) -> tuple[VideoFrame, Fraction, int]:
    """The first frame, seconds and number of frames of a file without a table."""
    first: VideoFrame | None = None
    table = FrameTable()
    end = Fraction(0)  # of any stream
    with reject_video("video_corrupt"):
        for packet in video.container.demux():
            end = max(end, _end_of(packet))
            if packet.stream.index != video.stream.index:
                continue
            table.add(packet)
            if first is None:
                first = next(iter(packet.decode()), None)  # pyright: ignore[reportAssignmentType]
    if first is None or not table.starts:
        raise ImageError("video_no_frames", f"{len(table.starts)} packets, nothing to decode")
    told = video.container.duration
    if told is not None and end + SLACK_SECONDS < Fraction(told, 1_000_000):
        raise ImageError("video_truncated", f"ends after {float(end):.1f} s, header says {told / 1e6:.1f} s")
    return first, (table.end - min(table.starts)) * video.time_base, len(table.starts)


def _end_of(packet: Packet[Any]) -> Fraction:
    """Seconds at which what a packet holds has been shown."""
    ticks = (packet.pts or 0) + (packet.duration or 0)
    return Fraction(ticks) * packet.time_base if packet.size else Fraction(0)


class FrameTable:
    """When each frame appears, in ticks of the stream's clock, from its packets in the order of the file."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self._last, self._duration = 0, 0

    def add(self, packet: Packet[Any]) -> None:
        """Take a packet; those that end a file or are never shown have no frame.

        Raises:
            ImageError: it is cut off, has no time, or is one too many.
        """
        if not packet.size or packet.is_discard:
            return
        if packet.is_corrupt:
            raise ImageError("video_truncated", f"frame {len(self.starts)} is cut off")
        if packet.pts is None:
            raise ImageError("video_no_timestamps", f"frame {len(self.starts)} has no time")
        if len(self.starts) == MAX_FRAMES:
            raise ImageError("video_too_many_frames", f"limit {MAX_FRAMES}")
        self.starts.append(packet.pts)
        if packet.pts >= self._last:
            self._last, self._duration = packet.pts, packet.duration or 0

    @property
    def end(self) -> int:
        """When the last frame is gone: where its packet does not say, it stays as long as the others on average."""
        first, last = min(self.starts), max(self.starts)
        return last + (self._duration or (last - first) // max(1, len(self.starts) - 1))
