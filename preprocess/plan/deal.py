"""Dealing: blocks of the index to windows. Pure arrays.

    position   the blocks of a source, shuffled, stand at equal distances on [0, 1)
    window     the blocks of all sources, by position, are cut where the pieces are equally many

So every window holds of every source what the source has of all, within one block on either side: a window is a
stretch of [0, 1), and a stretch of length x holds x of each source's equally spaced blocks, rounded up or down. No
source waits for the end, and a source of one block stands anywhere with equal chance. Windows are equally full, so
that the last one fills its packs as well as the first.

Copy c of a block goes c * (windows // copies) windows further, round about: no two copies of a sample meet in one
window, hence in no pack. There are at least as many windows as copies of the most repeated source.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from preprocess.plan.files import Ints

# One record per part of a block that goes to a window: rows [first, first + rows) of the row group `group` that begins
# at row `begin` of its unit.
SLICE_DTYPE = np.dtype(
    [(name, np.int32) for name in ("window", "unit", "group", "begin", "first", "rows", "copy")]
)

# A window is made of at least about this many slices: enough to mix, few enough to read.
SLICES_PER_WINDOW = 16


@dataclass(frozen=True, slots=True)
class Blocks:
    """Columns over blocks. `pieces`: what a block brings to the windows in one use. `source`: number of its source."""

    unit: npt.NDArray[np.int32]
    group: npt.NDArray[np.int32]
    begin: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int32]
    pieces: npt.NDArray[np.int32]
    source: npt.NDArray[np.int32]


def deal(
    blocks: Blocks, repeat_s: npt.NDArray[np.float64], window: int, rng: np.random.Generator
) -> npt.NDArray[np.void]:
    """Slices (SLICE_DTYPE) sorted by window; windows of at most about `window` pieces, numbered from 0.

    `repeat_s`: how often each source is used.
    """
    total = float((blocks.pieces * repeat_s[blocks.source]).sum())
    if not total:
        return np.empty(0, SLICE_DTYPE)
    copies_s = np.ceil(repeat_s).astype(np.int64)
    copies = int(copies_s[np.unique(blocks.source[blocks.pieces > 0])].max())
    windows = max(copies, int(np.ceil(total / window)))
    base, source, weight = _slice_blocks(blocks, repeat_s, total / windows, windows)
    base["window"] = _even_windows(source, weight, windows, rng)
    dealt = [base]
    for copy in range(1, copies):
        more = base[copies_s[source] > copy].copy()
        more["copy"] = copy
        more["window"] = (more["window"] + copy * (windows // copies)) % windows
        dealt.append(more)
    slices = np.concatenate(dealt)
    # Numbers without gaps: a block that cannot be cut further may fill several windows.
    slices["window"] = np.unique(slices["window"], return_inverse=True)[1]
    return np.sort(slices, order=["window", "unit", "group", "first", "copy"])


def _slice_blocks(
    blocks: Blocks, repeat_s: npt.NDArray[np.float64], per_window: float, windows: int
) -> tuple[npt.NDArray[np.void], npt.NDArray[np.int32], npt.NDArray[np.float64]]:
    """Slices of copy 0 in the order of blocks, the source of each, and the pieces it brings in all its copies.

    Blocks are cut where a window would otherwise be made of few; blocks without pieces are left out.
    """
    used = np.flatnonzero(blocks.pieces)
    rows, source = blocks.rows[used].astype(np.int64), blocks.source[used]
    weight = blocks.pieces[used] * repeat_s[source]
    if windows > 1:
        parts = np.ceil(weight / max(1.0, per_window / SLICES_PER_WINDOW)).astype(np.int64)
        parts = np.minimum(parts, rows)
    else:
        parts = np.ones_like(rows)
    block = np.repeat(np.arange(len(used)), parts)
    number = np.arange(len(block)) - np.repeat(np.cumsum(parts) - parts, parts)
    first = rows[block] * number // parts[block]
    slices = np.zeros(len(block), SLICE_DTYPE)
    for name in ("unit", "group", "begin"):
        slices[name] = getattr(blocks, name)[used][block]
    slices["first"] = first
    slices["rows"] = rows[block] * (number + 1) // parts[block] - first
    return slices, source[block], weight[block] * slices["rows"] / rows[block]


def _even_windows(
    source: npt.NDArray[np.int32], weight: npt.NDArray[np.float64], windows: int, rng: np.random.Generator
) -> Ints:
    """The window of every slice."""
    position = np.empty(len(source))
    for number in np.unique(source):
        own = np.flatnonzero(source == number)
        position[own] = (rng.permutation(len(own)) + rng.random()) / len(own)
    order = np.argsort(position, kind="stable")
    middle = np.cumsum(weight[order]) - weight[order] / 2
    window = np.empty(len(source), np.int64)
    window[order] = np.minimum(middle * windows / weight.sum(), windows - 1)
    return window
