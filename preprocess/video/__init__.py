"""Encoded video -> frames at their patch grid: mp4, mov, webm, mkv, avi, whatever codec PyAV's FFmpeg decodes.

    container  which stream of the file, its limits and errors
    header     size as displayed, length and number of frames; one frame is decoded
    sampling   how many frames are taken, and which
    decode     those frames and what they are predicted from, nothing else
    picture    a decoded frame to RGB, upright, at its patch grid

Frames are those on screen at the middle of n equal parts of the video, so that a video of constant or variable
rate is seen alike. PyAV is imported when the first video is met: jobs without any never load it.
"""

from __future__ import annotations

from preprocess.video.decode import load_video
from preprocess.video.header import VideoHeader, read_video_header
from preprocess.video.sampling import num_temporal_patches, patches_per_frame

__all__ = ["VideoHeader", "load_video", "num_temporal_patches", "patches_per_frame", "read_video_header"]
