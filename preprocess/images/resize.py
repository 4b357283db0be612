"""The resize: torch's vectorized uint8 kernel."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt
import torch

from shared.geometry import Geometry

# Pillow's pixels are read-only and nothing here writes to them.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


def resize(pixels_hwc: npt.NDArray[np.uint8], h: int, w: int, geometry: Geometry) -> npt.NDArray[np.uint8]:
    """Antialiased resize, uint8 [H, W, C] -> uint8 [h * p, w * p, C].

    torch's uint8 kernel for channels-last pictures: vectorized fixed-point arithmetic, first the width, then
    the height, within a level of Pillow's result in that order (two in less than one value of a million).
    What it is worth: benchmarks/images.py.
    """
    height, width = h * geometry.patch_size, w * geometry.patch_size
    if pixels_hwc.shape[:2] == (height, width):
        return pixels_hwc
    # A view: [1, C, H, W] with channels last in memory; torch 2.13 misreads other orders of one-pixel columns.
    picture = torch.from_numpy(np.ascontiguousarray(pixels_hwc)).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(
        picture, size=(height, width), mode=geometry.filter, antialias=True, align_corners=False
    )
    return resized[0].permute(1, 2, 0).contiguous().numpy()
