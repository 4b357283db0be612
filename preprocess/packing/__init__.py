"""Joint packing: pieces into packs of S tokens and N vision rows of L patches. Pure arrays, no I/O.

    pieces --sort--> 512 strata alike in (tokens, patches) --top of each--> one pack after another

Both budgets fill together because of five rules, each found by trying (benchmarks/packing.py measures them):

- *Aim.* A pack aims at an equal part of what the pool still holds. Tokens and patches count in units of that
  aim, so the right mixture is the diagonal, whatever the ratio of the two budgets.
- *Direction.* After the largest piece left, each step takes the piece after which tokens and patches lack the
  same share of the aim; among equals, the larger. Big pieces go early, small ones are left to fill gaps.
- *Pace.* All strata are used up at the same rate: one that lags behind the pool goes first. Without it the first
  packs take the documents, two or three to a pack, and nothing but captions is left for the last.
- *Pairs.* As soon as two pieces can finish the pack, the pair that leaves least is searched: 8 first pieces, and
  for each the best second of all strata. The search is repeated at each step and the best end is taken.
- *Price.* What packs have left empty too often becomes dearer, so that the pool keeps its mixture to the end.

A stratum is a stack of pieces alike, the largest on top: 512 tops stand for the whole pool, whatever its size, so
the time per piece does not depend on the number of pieces. Images go to the fullest row that takes them, and a
piece that would leave a gap too small for most images counts for less. No budget is ever broken, no piece is cut,
every piece is placed exactly once.

docs/packing.md tells what it reaches beside what can be reached, and what was tried and is not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from preprocess.packing.fit import Ints, require_each_fits, surely_fit
from preprocess.packing.kernel import (
    COST,
    REFUSED,
    SHARE,
    TOKENS,
    Limits,
    Pieces,
    Pool,
    fill_packs,
    order_images,
    rank_by,
)
from shared.geometry import Budget

__all__ = ["Packing", "pack_pieces", "surely_fit"]

# Strata by vision cost, and by tokens within each. 16 x 16 fills 0.05 to 0.6 % less, in 0.7 of the time.
VISION_STRATA, TOKEN_STRATA = 16, 32


@dataclass(frozen=True, slots=True)
class Packing:
    """`pack_n`: pack of each piece, 0 .. num_packs - 1. `row_i`: vision row of each image inside its pack."""

    num_packs: int
    pack_n: npt.NDArray[np.int32]
    row_i: npt.NDArray[np.int32]


def pack_pieces(
    tokens_n: npt.NDArray[Any],
    image_offsets: npt.NDArray[Any],
    patches_i: npt.NDArray[Any],
    budget: Budget,
    images_per_row: int = 0,
) -> Packing:
    """Pack pieces of `tokens_n` tokens; piece i has the images [image_offsets[i], image_offsets[i + 1]).

    `images_per_row` bounds the images of one vision row; 0 is no bound. Packs are numbered as they are filled, the
    emptiest last: shuffle them. Pieces of the same size are taken in their order: shuffle those, too. One thread; the
    same input gives the same packs on every machine.

    Raises:
        ValueError: a piece cannot fit an empty pack; the message names it and the budget.
    """
    if budget.S >= REFUSED:
        raise ValueError(f"S = {budget.S} is too large to plan; below {REFUSED} was expected")
    row_i = np.zeros(len(patches_i), np.int32)
    if not len(tokens_n):
        return Packing(0, np.zeros(0, np.int32), row_i)
    shift = max(0, (budget.N * budget.L).bit_length() - 30)
    one_row = budget.N == 1 and not images_per_row and not shift
    limits = Limits(budget.S, budget.N, budget.L, images_per_row, shift, one_row)
    order_i = np.empty(0 if one_row else len(row_i), np.int32)
    tokens_n, image_offsets, patches_i = (
        np.ascontiguousarray(column, np.int64) for column in (tokens_n, image_offsets, patches_i)
    )
    pieces = Pieces(tokens_n, image_offsets, patches_i, order_i, row_i)
    if not one_row:
        order_images(pieces)
    require_each_fits(pieces, budget, images_per_row)
    pool, cost = _pool(pieces, limits)
    pack_n = np.zeros(len(tokens_n), np.int32)  # after the sort, which is when most memory is in use
    return Packing(fill_packs(pool, pieces, cost, pack_n, limits), pack_n, row_i)


def _pool(pieces: Pieces, limits: Limits) -> tuple[Pool, int]:
    """Strata of equal numbers of pieces: by vision cost, then by tokens; within one the largest share first.

    Also the sum of all costs. Sorted in place, each piece one number of 64 bits: its measure above its own number.
    """
    key_n = np.arange(len(pieces.tokens_n))
    cost = int(rank_by(COST, key_n, pieces, limits))
    key_n.sort()
    rank_by(TOKENS, key_n, pieces, limits)
    for band in np.array_split(key_n, VISION_STRATA):
        band.sort()
    rank_by(SHARE, key_n, pieces, limits)
    edges: Ints = np.unique(np.linspace(0, len(key_n), VISION_STRATA * TOKEN_STRATA + 1).astype(np.int64))
    for stratum in np.split(key_n, edges[1:-1]):
        stratum.sort()
    return Pool(key_n.astype(np.int32), edges[:-1].copy(), edges[1:].copy()), cost
