"""What fits an empty pack."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from preprocess.packing.compiled import compiled
from preprocess.packing.kernel import Pieces, empty_rows, place_images
from shared.geometry import Budget

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def surely_fit(
    tokens_n: npt.NDArray[Any],
    image_offsets: npt.NDArray[Any],
    patches_i: npt.NDArray[Any],
    budget: Budget,
    images_per_row: int,
) -> Mask:
    """Whether each piece fits an empty pack, without placing its images; the others may fit as well.

    Images of at most L patches fit where each can have a row of its own, in a single row that takes them all, and
    where they come to no more than N * (L - the largest): a new row is opened only when each open one holds more than
    L - the largest.
    """
    fits_n = np.empty(len(tokens_n), np.bool_)
    tokens_n, offset_n, patches_i = (
        np.ascontiguousarray(column, np.int64) for column in (tokens_n, image_offsets, patches_i)
    )
    _surely_fit(tokens_n, offset_n, patches_i, budget.S, budget.N, budget.L, images_per_row, fits_n)
    return fits_n


@compiled
def _surely_fit(
    tokens_n: Ints,
    offset_n: Ints,
    patches_i: Ints,
    S: int,
    N: int,
    L: int,
    images_per_row: int,
    fits_n: Mask,
) -> None:
    for piece in range(len(tokens_n)):
        count, total, largest = offset_n[piece + 1] - offset_n[piece], 0, 0
        for image in range(offset_n[piece], offset_n[piece + 1]):
            total += patches_i[image]
            largest = max(largest, patches_i[image])
        shared = total <= N * (L - largest) or (N == 1 and total <= L)
        shared = shared and (images_per_row == 0 or count <= images_per_row)
        fits_n[piece] = tokens_n[piece] <= S and largest <= L and (count <= N or shared)


def require_each_fits(pieces: Pieces, budget: Budget, images_per_row: int) -> None:
    """Pieces that do not fit surely are tried in an empty pack.

    Raises:
        ValueError: one does not fit; names it and the budget.
    """
    tokens_n, offset_n, patches_i = pieces[:3]
    for piece in np.flatnonzero(~surely_fit(tokens_n, offset_n, patches_i, budget, images_per_row)).tolist():
        patches = patches_i[offset_n[piece] : offset_n[piece + 1]]
        name = "S" if tokens_n[piece] > budget.S else "L" if (patches > budget.L).any() else ""
        if not name and (
            budget.N == 1 or not place_images(piece, pieces, empty_rows(budget.N, budget.L), images_per_row)
        ):
            name = "N"
        if name:
            raise ValueError(
                f"piece {piece} of {tokens_n[piece]} tokens and {patches.tolist()} patches exceeds budget {name}"
            )
