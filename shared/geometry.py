"""Geometry: what a picture becomes. Integers and numpy only, shared by both stages.

Legend, the same letters in the whole system (a suffix on a name is its logical shape):

    B  packs per microbatch on one data-parallel rank
    S  decoder tokens per pack
    N  vision rows per pack
    L  patches per vision row
    P  values per patch = pt * p * p * 3
    m  spatial merge: m x m patches become one visual token
    E, D  encoder width, decoder width
    H, K, V  heads, head width, vocabulary

    picture H x W --resize--> (h*p) x (w*p) --patchify--> [t*h*w, P] --merge--> t*h*w / (m*m) tokens

A *cell* is m x m patches, the picture that one visual token sees; every resized side is a whole number of
cells. Patches are stored cell by cell, so that merging is a reshape and never a gather:

    (t pt) (h mh ph) (w mw pw) c  ->  (t h w mh mw) (pt ph pw c)

    m = 1 (raster)      m = 2 (cell by cell)
    0  1  2  3          0  1  4  5
    4  5  6  7          2  3  6  7
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from einops import rearrange

from shared.arrays import runs
from shared.config import require_at_least

IntArray = npt.NDArray[np.integer[Any]]

PATCH_ORDER = "(t pt) (h mh ph) (w mw pw) c -> (t h w mh mw) (pt ph pw c)"
CHANNELS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What one pack holds: S decoder tokens, and images in N vision rows of L patches."""

    S: int
    N: int
    L: int

    def __post_init__(self) -> None:
        require_at_least(self, 1, "S", "N", "L")


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """How a picture becomes patches. Part of the fingerprint: two data sets that differ here do not mix."""

    patch_size: int = 16
    temporal_patch_size: int = 1
    merge: int = 2
    max_patches_per_image: int = 1024
    resize: Literal["native", "fill"] = "native"
    filter: Literal["bilinear", "bicubic"] = "bilinear"
    # SigLIP2 was trained on (x / 255 - 0.5) / 0.5 and bilinear pictures.
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        require_at_least(self, 1, "patch_size", "temporal_patch_size", "merge")
        if self.max_patches_per_image < self.merge**2:
            raise ValueError(
                f"max_patches_per_image {self.max_patches_per_image} is below one cell of "
                f"{self.merge} x {self.merge} patches"
            )
        if len(self.mean) != CHANNELS or len(self.std) != CHANNELS or min(self.std) <= 0:
            raise ValueError(
                f"mean and std need {CHANNELS} values each, std above 0; got {self.mean}, {self.std}"
            )

    @property
    def cell(self) -> int:
        """Pixels per side of the picture that one visual token sees."""
        return self.patch_size * self.merge

    @property
    def values_per_patch(self) -> int:
        """P."""
        return self.temporal_patch_size * self.patch_size**2 * CHANNELS

    @property
    def patches_per_token(self) -> int:
        return self.merge**2


def resize_grid(
    heights: IntArray, widths: IntArray, geometry: Geometry, caps: IntArray | None = None
) -> npt.NDArray[np.int32]:
    """Patch grid (h, w) of each picture after the resize: int32 [n, 2], multiples of m, at most the cap.

    `heights` and `widths` are pixels as displayed (EXIF applied), int [n], at least 1. The resized picture
    is (h * p) x (w * p) pixels. `caps` are the most patches of each picture, int [n], at least one cell;
    without it, `max_patches_per_image` of all.
    """
    height_n, width_n = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
    if height_n.size and min(height_n.min(), width_n.min()) < 1:
        raise ValueError("picture sides must be at least 1 pixel")
    cap_n = np.full_like(height_n, geometry.max_patches_per_image) if caps is None else np.asarray(caps)
    cap_n = cap_n.astype(np.int64) // geometry.patches_per_token
    if cap_n.size and cap_n.min() < 1:
        raise ValueError(f"a cap must hold one cell, {geometry.patches_per_token} patches")
    rule = _native_cells if geometry.resize == "native" else _fill_cells
    # Data sets repeat few sizes very often: solve each size once.
    sizes_n3 = np.stack([height_n, width_n, cap_n], axis=-1).reshape(-1, 3)
    unique_u3, inverse_n = np.unique(sizes_n3, axis=0, return_inverse=True)
    cells_u2 = np.empty_like(unique_u3[:, :2])
    for start in range(0, len(unique_u3), 4096):
        block = unique_u3[start : start + 4096]
        cells_u2[start : start + 4096] = rule(block[:, 0], block[:, 1], block[:, 2], geometry.cell)
    return (cells_u2[inverse_n.reshape(-1)] * geometry.merge).astype(np.int32)


def _native_cells(height_u: IntArray, width_u: IntArray, max_cells_u: IntArray, cell: int) -> IntArray:
    """Never scale up (except to reach one cell), keep the aspect ratio, waste little of the cap.

    Among all grids a x b of cells inside the picture and the cap, take the least `stretch**2 * unused`,
    where stretch >= 1 is the factor by which the aspect ratio is bent and unused >= 1 the factor by which
    the cells available exceed those used. The square makes one per cent of bend worth two per cent of the
    cap (benchmarks/geometry.py: what that gives). For each a only the two b next to the true aspect ratio can
    be best.
    Only quotients of integers are compared, so every IEEE machine picks the same grid.
    """
    limit_a_u = np.maximum(1, height_u // cell)
    limit_b_u = np.minimum(np.maximum(1, width_u // cell), max_cells_u)
    limit_a_u = np.minimum(limit_a_u, max_cells_u)
    # The largest a worth trying keeps the true aspect at the cap; the smallest spends half of what it could.
    ideal_u = np.sqrt(max_cells_u * (height_u / width_u))
    top_u = np.minimum(limit_a_u, np.ceil(ideal_u).astype(np.int64) + 1).clip(1)
    low_u = np.minimum(top_u, np.floor(top_u * 0.5).astype(np.int64)).clip(1)
    steps = int((top_u - low_u).max()) + 1 if len(top_u) else 1
    a_uk = np.minimum(low_u[:, None] + np.arange(steps), top_u[:, None])
    exact_uk = a_uk * width_u[:, None] // height_u[:, None]
    b_uk2 = np.stack([exact_uk, exact_uk + 1], axis=-1)
    b_uk2 = np.minimum(b_uk2, np.minimum(limit_b_u[:, None], max_cells_u[:, None] // a_uk)[..., None]).clip(1)
    a_uk2 = np.broadcast_to(a_uk[..., None], b_uk2.shape)
    x_uk2, y_uk2 = a_uk2 * width_u[:, None, None], b_uk2 * height_u[:, None, None]
    stretch_uk2 = np.maximum(x_uk2, y_uk2) / np.minimum(x_uk2, y_uk2)
    score_uk2 = stretch_uk2 * stretch_uk2 / (a_uk2 * b_uk2)
    best_u = score_uk2.reshape(len(height_u), -1).argmin(axis=1)
    row = np.arange(len(height_u))
    return np.stack([v.reshape(len(height_u), -1)[row, best_u] for v in (a_uk2, b_uk2)], axis=-1)


def _fill_cells(height_u: IntArray, width_u: IntArray, max_cells_u: IntArray, cell: int) -> IntArray:
    """Scale up or down until the cap is used: the rule of SigLIP2 NaFlex (arXiv:2502.14786, section 2.4).

    Bisection of one scale for both sides in [1e-6, 100] down to 1e-5, each side rounded up to whole cells;
    the same arithmetic as the Hugging Face processor, so that the sizes agree.
    """
    low_u, high_u = np.full(len(height_u), 1e-6), np.full(len(height_u), 100.0)

    def cells(scale_u: npt.NDArray[np.float64]) -> IntArray:
        sides = [np.ceil(side_u * scale_u / cell).astype(np.int64).clip(1) for side_u in (height_u, width_u)]
        return np.stack(sides, axis=-1)

    while (active_u := high_u - low_u >= 1e-5).any():
        middle_u = (low_u + high_u) / 2
        fits_u = cells(middle_u).prod(axis=-1) <= max_cells_u
        low_u = np.where(active_u & fits_u, middle_u, low_u)
        high_u = np.where(active_u & ~fits_u, middle_u, high_u)
    return cells(low_u)


def visual_tokens(t: int, h: int, w: int, merge: int) -> int:
    """Image tokens of a picture of t x h x w patches, without its begin and end token."""
    return t * h * w // merge**2


def patchify(frames_thwc: npt.NDArray[np.uint8], geometry: Geometry) -> npt.NDArray[np.uint8]:
    """uint8 [T, h*p, w*p, 3] -> a view [t, h/m, w/m, m, m, pt, p, p, 3] in patch order, nothing copied yet.

    Assigning it to the reshaped destination is the one copy: `out_NP.reshape(view.shape)[...] = view`.
    """
    p, m = geometry.patch_size, geometry.merge
    return rearrange(
        frames_thwc,
        "(t pt) (h mh ph) (w mw pw) c -> t h w mh mw pt ph pw c",
        pt=geometry.temporal_patch_size,
        mh=m,
        mw=m,
        ph=p,
        pw=p,
    )


def write_patches(
    frames_thwc: npt.NDArray[np.uint8], geometry: Geometry, out_NP: npt.NDArray[np.uint8]
) -> None:
    """The one copy of a picture into its place: uint8 [T, h*p, w*p, 3] -> uint8 [t*h*w, P], contiguous.

    What assigning `patchify` does, in two thirds of its time: the pixels of one line of a patch lie side by side
    here and there, and are moved as one item.
    """
    line = np.dtype((np.void, CHANNELS * geometry.patch_size))
    lines = rearrange(
        frames_thwc.reshape(*frames_thwc.shape[:2], -1).view(line),
        "(t pt) (h mh ph) (w mw) -> t h w mh mw pt ph",
        pt=geometry.temporal_patch_size,
        mh=geometry.merge,
        mw=geometry.merge,
        ph=geometry.patch_size,
    )
    out_NP.reshape(-1).view(line).reshape(lines.shape)[...] = lines


def unpatchify(
    patches_NP: npt.NDArray[np.uint8], t: int, h: int, w: int, geometry: Geometry
) -> npt.NDArray[np.uint8]:
    """uint8 [t*h*w, P] in patch order -> the picture uint8 [t*pt, h*p, w*p, 3]; inverse of `patchify`."""
    m, p = geometry.merge, geometry.patch_size
    return rearrange(
        patches_NP,
        "(t h w mh mw) (pt ph pw c) -> (t pt) (h mh ph) (w mw pw) c",
        t=t,
        h=h // m,
        w=w // m,
        mh=m,
        mw=m,
        pt=geometry.temporal_patch_size,
        ph=p,
        pw=p,
    )


def patch_positions(grid_thw_n3: IntArray, merge: int) -> npt.NDArray[np.int32]:
    """(t, h, w) of every patch inside its own picture, pictures one after another: int32 [sum(t*h*w), 3].

    `grid_thw_n3` is the size of each picture in patches. Closed form, without a loop over pictures.
    """
    size_n3 = np.asarray(grid_thw_n3, np.int64).reshape(-1, 3)
    count_n = size_n3.prod(axis=1)
    index = runs(np.zeros_like(count_n), count_n)
    h, w = np.repeat(size_n3[:, 1], count_n), np.repeat(size_n3[:, 2], count_n)
    frame, inside = np.divmod(index, h * w)
    cell, within = np.divmod(inside, merge * merge)
    cell_h, cell_w = np.divmod(cell, w // merge)
    sub_h, sub_w = np.divmod(within, merge)
    return np.stack([frame, cell_h * merge + sub_h, cell_w * merge + sub_w], axis=-1).astype(np.int32)


def row_offsets(row_n: IntArray, patches_n: IntArray) -> npt.NDArray[np.int64]:
    """Offset of each image inside its vision row: images of one row follow each other without gaps."""
    offset_n = np.zeros(len(row_n), np.int64)
    for row in np.unique(row_n):
        here = row_n == row
        offset_n[here] = np.cumsum(patches_n[here]) - patches_n[here]
    return offset_n
