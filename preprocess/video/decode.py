"""The chosen frames of a video, and of the others only those that they are predicted from.

All packets are read first, which costs next to nothing and says exactly where frames and key frames lie. Between
two chosen frames the decoder goes on from where it is, or starts again at the last key frame before the next one if
that lies ahead. Frames that no other is predicted from are not decoded unless chosen (benchmarks/video.py).
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from preprocess.config import ImageLimits, VideoConfig
from preprocess.images import ImageError
from preprocess.video.container import display_size, open_video, reject_video
from preprocess.video.header import FrameTable, check_length
from preprocess.video.picture import orientation_of, to_picture
from preprocess.video.sampling import frames_on_screen
from shared.geometry import Geometry

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# Decoders that may be told before each packet whether to skip it, and give the same pixels for the others.
SKIPPING = ("h264", "hevc", "mpeg4")


def load_video(
    data: bytes | memoryview,
    *,
    size: tuple[int, int],
    grid: tuple[int, int, int],
    geometry: Geometry,
    limits: ImageLimits,
    config: VideoConfig,
    background: tuple[int, int, int],
) -> npt.NDArray[np.uint8]:
    """uint8 [t * pt, h * p, w * p, 3], ready for `patchify`.

    Args:
        size: (height, width) as displayed, which the scan found.
        grid: (t, h, w), patches.

    Raises:
        ImageError: beyond a limit, not of that size, or a frame cannot be decoded, all of it.
    """
    t, h, w = grid
    p = geometry.patch_size
    out = np.empty((t * geometry.temporal_patch_size, h * p, w * p, 3), np.uint8)
    with open_video(io.BytesIO(data), limits, config) as video, reject_video("video_corrupt"):
        packets = [packet for packet in video.container.demux(video.stream) if packet.size]
        starts, end = _table(packets)
        check_length((end - int(starts[0])) * video.time_base, config)
        chosen = starts[frames_on_screen(starts, end, len(out))]
        for frame in decode_chosen(packets, set(chosen.tolist()), video.stream):
            found = display_size(frame, video.stream, orientation_of(frame).turned)
            if found != size:
                raise ImageError(
                    "video_corrupt", f"{found[1]} x {found[0]} pixels, {size[1]} x {size[0]} in the scan"
                )
            out[chosen == frame.pts] = to_picture(frame, (h, w), geometry, background)
    return out


def _table(packets: Sequence[Packet[VideoStream]]) -> tuple[npt.NDArray[np.int64], int]:
    """When each frame appears, ascending, and when the last is gone, in ticks."""
    table = FrameTable()
    for packet in packets:
        table.add(packet)
    if not table.starts:
        raise ImageError("video_no_frames", "no packets")
    return np.unique(np.array(table.starts, np.int64)), table.end


def decode_chosen(
    packets: Sequence[Packet[VideoStream]], chosen: set[int], stream: VideoStream
) -> Iterator[VideoFrame]:
    """The frames with the time stamps `chosen`, ascending; `packets` are all of the stream, in its order.

    Raises:
        ImageError: one does not come out, or not whole.
    """
    context = stream.codec_context
    skips = context.name in SKIPPING
    number_of = {packet.pts: number for number, packet in reversed(list(enumerate(packets)))}
    keys = [number for number, packet in enumerate(packets) if packet.is_keyframe]
    position, waiting = 0, set(chosen)
    for pts in sorted(chosen):
        if pts not in waiting:
            continue
        if (start := _entry(packets, keys, number_of[pts], pts)) > position:
            context.flush_buffers()
            position = start
        while pts in waiting:
            if position > len(packets):
                raise ImageError("video_corrupt", f"no frame comes out for time stamp {pts}")
            packet = packets[position] if position < len(packets) else None  # None: what is still inside
            if skips:
                context.skip_frame = "DEFAULT" if packet is None or packet.pts in chosen else "NONREF"
            for frame in context.decode(packet):
                if frame.pts not in waiting:
                    continue
                if frame.is_corrupt:
                    raise ImageError("video_corrupt", f"the frame of time stamp {frame.pts} is damaged")
                waiting.remove(frame.pts)
                yield frame
            position += 1


def _entry(packets: Sequence[Packet[VideoStream]], keys: Sequence[int], number: int, pts: int) -> int:
    """Where to begin for a frame: at the last key frame that is neither stored nor shown behind it.

    Frames stored behind a key frame and shown before it may be predicted from what lies before it.
    """
    place = bisect_right(keys, number) - 1
    while place >= 0 and (packets[keys[place]].pts or 0) > pts:
        place -= 1
    return keys[place] if place >= 0 else 0
