"""The resize: torch's vectorized uint8 kernel."""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from shared.geometry import Geometry

# Pillow's pixels are read-only and nothing here writes to them.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


def resize(
    pixels_hwc: npt.NDArray[np.uint8],
    h: int,
    w: int,
    geometry: Geometry,
    *,
    covered: tuple[float, float] | None = None,
) -> npt.NDArray[np.uint8]:
    """Antialiased resize, uint8 [H, W, C] -> uint8 [h * p, w * p, C].

    covered: rows and columns of the array that the picture covers, where it ends inside the last pixel: 2225 rows
        decoded to an eighth lie in 279 rows and cover 278.125. None: all.

    torch's uint8 kernel for channels-last pictures: vectorized fixed-point arithmetic, first the width, then
    the height, within a level of Pillow's result in that order (two in less than one value of a million).
    What it is worth: benchmarks/images.py.
    """
    height, width = h * geometry.patch_size, w * geometry.patch_size
    if covered is None and pixels_hwc.shape[:2] == (height, width):
        return pixels_hwc
    # A view: [1, C, H, W] with channels last in memory; torch 2.13 misreads other orders of one-pixel columns.
    picture = torch.from_numpy(np.ascontiguousarray(pixels_hwc)).permute(2, 0, 1)[None]
    interpolate = partial(
        torch.nn.functional.interpolate, mode=geometry.filter, antialias=True, align_corners=False
    )
    if covered is None:
        resized = interpolate(picture, size=(height, width))
    else:
        # Given a factor, torch makes floor(rows * factor) rows: at least as many as wanted, the first ones are.
        factors = tuple((side + 1e-6) / rows for side, rows in zip((height, width), covered, strict=True))
        resized = interpolate(picture, scale_factor=factors)[..., :height, :width]
    return resized[0].permute(1, 2, 0).contiguous().numpy()
