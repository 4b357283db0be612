"""Lossless prediction of pixels, in compiled loops: what remains for `zstandard` are small numbers around 0.

    (r, g, b)  ->  g, r - g + 128, b - g + 128                        what the channels share is stored once
    value      ->  value - median(left, up, left + up - corner)       the predictor of JPEG-LS: flat, slope, edge

Everything is modulo 256, so any picture comes back bit for bit. Patches are read and written where they lie, in
patch order: one pass, and no picture in between. Only `codecs` imports this module, and only for a data set that
needs it. Numba compiles at the first call, in less than a second per process; it caches nothing on disk, which
takes a directory that every process may write.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numba
import numpy as np
import numpy.typing as npt

_Bytes = npt.NDArray[np.uint8]
# (patches [t*h*w, P], residuals [t*pt, 3, h*p, w*p], h, w, merge, patch size)
_Kernel = Callable[[_Bytes, _Bytes, int, int, int, int], None]

_compiled = cast("Callable[[Any], Any]", numba.njit(nogil=True))


@_compiled
def _guess(left: Any, up: Any, corner: Any) -> Any:
    """The median of left, up and left + up - corner."""
    low, high = min(left, up), max(left, up)
    return min(max(left + up - corner, low), high)


@_compiled
def _place(frame: Any, y: Any, column: Any, h: Any, w: Any, m: Any, p: Any, values_per_patch: Any) -> Any:
    """Where the pixels of row `y` in the patch column `column` of a frame lie in the flat patches."""
    pt = values_per_patch // (p * p * 3)
    cell = (frame // pt * h + y // (m * p) * m) * w + column // m * m * m
    patch = cell + y // p % m * m + column % m
    return patch * values_per_patch + (frame % pt * p + y % p) * p * 3


def _predict(patches: Any, residuals: Any, h: Any, w: Any, m: Any, p: Any) -> None:
    values = patches.reshape(-1)
    above = np.empty((3, w * p), np.int64)  # the three planes of the row before
    for frame in range(residuals.shape[0]):
        above[0], above[1], above[2] = 0, 128, 128
        for y in range(h * p):
            left_g, left_r, left_b = above[0, 0], above[1, 0], above[2, 0]
            corner_g, corner_r, corner_b = left_g, left_r, left_b
            for column in range(w):
                place = _place(frame, y, column, h, w, m, p, patches.shape[1])
                for x in range(column * p, (column + 1) * p):
                    up_g, up_r, up_b = above[0, x], above[1, x], above[2, x]
                    g = np.int64(values[place + 1])
                    r, b = (values[place] - g + 128) & 255, (values[place + 2] - g + 128) & 255
                    residuals[frame, 0, y, x] = (g - _guess(left_g, up_g, corner_g)) & 255
                    residuals[frame, 1, y, x] = (r - _guess(left_r, up_r, corner_r)) & 255
                    residuals[frame, 2, y, x] = (b - _guess(left_b, up_b, corner_b)) & 255
                    left_g, left_r, left_b = g, r, b
                    corner_g, corner_r, corner_b = up_g, up_r, up_b
                    above[0, x], above[1, x], above[2, x] = g, r, b
                    place += 3


def _restore(patches: Any, residuals: Any, h: Any, w: Any, m: Any, p: Any) -> None:
    values = patches.reshape(-1)
    above = np.empty((3, w * p), np.int64)
    for frame in range(residuals.shape[0]):
        above[0], above[1], above[2] = 0, 128, 128
        for y in range(h * p):
            g, r, b = above[0, 0], above[1, 0], above[2, 0]
            corner_g, corner_r, corner_b = g, r, b
            for column in range(w):
                place = _place(frame, y, column, h, w, m, p, patches.shape[1])
                for x in range(column * p, (column + 1) * p):
                    up_g, up_r, up_b = above[0, x], above[1, x], above[2, x]
                    g = (residuals[frame, 0, y, x] + _guess(g, up_g, corner_g)) & 255
                    r = (residuals[frame, 1, y, x] + _guess(r, up_r, corner_r)) & 255
                    b = (residuals[frame, 2, y, x] + _guess(b, up_b, corner_b)) & 255
                    corner_g, corner_r, corner_b = up_g, up_r, up_b
                    above[0, x], above[1, x], above[2, x] = g, r, b
                    values[place] = (r + g - 128) & 255
                    values[place + 1] = g
                    values[place + 2] = (b + g - 128) & 255
                    place += 3


predict: _Kernel = _compiled(_predict)
"""Fill `residuals` from `patches`."""

restore: _Kernel = _compiled(_restore)
"""Fill `patches` from `residuals`."""
