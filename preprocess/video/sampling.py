"""How many frames of a video are taken, and which.

n = t * pt frames; frame i is the one on screen at the middle of the i-th of n equal parts

frames    |0 |1 |2 |3 |4 |5 |6 |7 |8 |9 |      a video of 10 frames, n = 4
times        *       *      *      *           taken: 1, 3, 6, 8
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import numpy.typing as npt

from preprocess.config import VideoConfig
from preprocess.video.header import VideoHeader
from shared.geometry import Geometry


def num_temporal_patches(header: VideoHeader, config: VideoConfig, geometry: Geometry) -> int:
    """t: `fps` frames per second in whole temporal patches of pt frames, within the bounds of the config.

    Never more than the video has frames for, and never so many that a frame has no room for one cell.
    """
    pt = geometry.temporal_patch_size
    wanted = int(header.duration * Fraction(config.fps) / pt + Fraction(1, 2))
    least, most = -(-config.min_frames // pt), max(1, config.max_frames // pt)
    room = config.patch_cap(geometry) // geometry.patches_per_token
    return max(1, min(max(wanted, least), most, room, -(-header.frames // pt)))


def patches_per_frame(t: int, config: VideoConfig, geometry: Geometry) -> int:
    """The most patches of each of t temporal patches: those of the video shared out, and none above a picture's."""
    return min(geometry.max_patches_per_image, config.patch_cap(geometry) // t)


def frames_on_screen(start_f: npt.NDArray[np.int64], end: int, n: int) -> npt.NDArray[np.int64]:
    """Which frame is on screen at each of n times: indices [n] into `start_f`.

    start_f: when each frame appears, ascending; the last stays until `end`. Times are whole ticks of the stream's
    clock, and nothing is rounded.
    """
    first = int(start_f[0])
    middle_n = (2 * np.arange(n) + 1) * (end - first)
    return np.searchsorted((start_f - first) * (2 * n), middle_n, side="right") - 1
