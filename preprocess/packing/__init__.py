"""Joint packing: pieces into packs of S tokens and N vision rows of L patches. Pure arrays, no I/O.

    pieces --sort--> 256 strata alike in (tokens, patches) --top of each--> one pack after another

Both budgets fill together because of four rules, each found by trying (benchmarks/packing.py measures them):

- *Aim.* A pack aims at an equal part of what the pool still holds. Tokens and patches count in units of that
  aim, so the right mixture is the diagonal, whatever the ratio of the two budgets.
- *Direction.* After the largest piece left, each step takes the piece after which tokens and patches lack the
  same share of the aim; among equals, the larger. Big pieces go early, small ones are left to fill gaps.
- *Pairs.* As soon as two pieces can finish the pack, the pair that leaves least is searched: 16 first pieces,
  and for each the best second of all strata. The search is repeated at each step and the best end is taken.
- *Price.* What packs have left empty too often becomes dearer, so that the pool keeps its mixture to the end.

A stratum is a stack of pieces alike, the largest on top: 256 tops stand for the whole pool, whatever its size, so
the time per piece does not depend on the number of pieces. Images go to the fullest row that takes them, and a
piece that would leave a gap too small for most images counts for less. No budget is ever broken, no piece is cut,
every piece is placed exactly once.

What was tried and is not here: best fit decreasing on both (pieces of one kind are left over, 1.15 to 1.2 times the
bound in packs); the same packer without the search for pairs (twice as fast, 0.6 to 1.2 % less filled); a waste that
also counts what exceeds the aim (0.3 % less filled).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from preprocess.packing.kernel import REFUSED, Images, Limits, Pool, empty_rows, fill_packs, place_images
from shared.geometry import Budget

Ints = npt.NDArray[np.int64]

# Strata by vision cost, and by tokens within each. 8 x 32 fills 0.3 % more where all pictures are of one size and
# up to 0.15 % less elsewhere; 32 x 8 fills less.
VISION_STRATA, TOKEN_STRATA = 16, 16


@dataclass(frozen=True, slots=True)
class Packing:
    """`pack_n`: pack of each piece, 0 .. num_packs - 1. `row_i`: vision row of each image inside its pack."""

    num_packs: int
    pack_n: Ints
    row_i: Ints


def pack_pieces(
    tokens_n: npt.NDArray[Any],
    image_offsets: npt.NDArray[Any],
    patches_i: npt.NDArray[Any],
    budget: Budget,
    images_per_row: int = 0,
    seed: int = 0,
) -> Packing:
    """Pack pieces of `tokens_n` tokens; piece i has the images [image_offsets[i], image_offsets[i + 1]).

    `images_per_row` bounds the images of one vision row; 0 is no bound. `seed` orders pieces of the same size and
    numbers the packs, in no order of length. One thread; the same input gives the same packs on every machine.

    Raises:
        ValueError: a piece cannot fit an empty pack; the message names it and the budget.
    """
    if budget.S >= REFUSED:
        raise ValueError(f"S = {budget.S} is too large to plan; below {REFUSED} was expected")
    rng = np.random.default_rng(seed)
    images = _images(image_offsets, patches_i)
    vision_n = _sum_per_piece(images.offset_n, patches_i)
    _check_each_fits(np.asarray(tokens_n), vision_n, images, budget, images_per_row)
    cost_n = vision_n
    if images_per_row:  # an image then takes its part of a row at least
        cost_n = _sum_per_piece(images.offset_n, np.maximum(patches_i, budget.L // images_per_row))
    shift = max(0, (budget.N * budget.L).bit_length() - 30)
    pool = _pool(np.asarray(tokens_n), vision_n, cost_n, images, budget, shift, rng)
    del vision_n, cost_n  # memory: the pool has its own
    pack_n = np.empty(len(tokens_n), np.int64)
    limits = Limits(budget.S, budget.N, budget.L, images_per_row, shift)
    num_packs = int(fill_packs(pool, images, pack_n, limits))
    del pool
    return Packing(num_packs, rng.permutation(num_packs)[pack_n], images.row_i.astype(np.int64))


def _images(image_offsets: npt.NDArray[Any], patches_i: npt.NDArray[Any]) -> Images:
    offset_n = np.asarray(image_offsets, np.int64)
    patches_i = np.ascontiguousarray(patches_i, np.int64)
    piece_i = np.repeat(np.arange(len(offset_n) - 1, dtype=np.int32), np.diff(offset_n))
    sorted_i = np.lexsort((-patches_i, piece_i)).astype(np.int32)
    return Images(offset_n, patches_i, sorted_i, np.empty(len(patches_i), np.int32))


def _sum_per_piece(offset_n: Ints, value_i: npt.NDArray[Any]) -> Ints:
    ends = np.zeros(len(value_i) + 1, np.int64)
    np.cumsum(value_i, out=ends[1:])
    return np.diff(ends[offset_n])


def _largest_per_piece(images: Images) -> Ints:
    """Patches of the largest image of each piece, 0 where it has none."""
    first_n = images.offset_n[:-1]
    has = first_n < images.offset_n[1:]
    largest_n = np.zeros(len(first_n), np.int64)
    largest_n[has] = images.patches_i[images.sorted_i[first_n[has]]]
    return largest_n


def _check_each_fits(
    tokens_n: npt.NDArray[Any], vision_n: Ints, images: Images, budget: Budget, images_per_row: int
) -> None:
    """At most N images of at most L patches fit surely, and images of no more than N * (L - the largest) patches: a
    new row is opened only when each open one holds more than L - the largest. Only other pieces are tried in an
    empty pack.
    """
    count_n, largest_n = np.diff(images.offset_n), _largest_per_piece(images)
    shared = vision_n <= budget.N * (budget.L - largest_n)
    if images_per_row:
        shared &= count_n <= images_per_row
    surely = (tokens_n <= budget.S) & (largest_n <= budget.L) & ((count_n <= budget.N) | shared)
    if budget.N == 1 and not images_per_row:
        surely |= (tokens_n <= budget.S) & (vision_n <= budget.L)
    for piece in np.flatnonzero(~surely).tolist():
        patches = images.patches_i[images.offset_n[piece] : images.offset_n[piece + 1]]
        name = "S" if tokens_n[piece] > budget.S else "L" if (patches > budget.L).any() else ""
        rows = empty_rows(budget.N, budget.L)
        if not name and not place_images(piece, images, rows, images_per_row):
            name = "N"
        if name:
            raise ValueError(
                f"piece {piece} of {tokens_n[piece]} tokens and {patches.tolist()} patches exceeds budget {name}"
            )


def _pool(
    tokens_n: npt.NDArray[Any],
    vision_n: npt.NDArray[Any],
    cost_n: npt.NDArray[Any],
    images: Images,
    budget: Budget,
    shift: int,
    rng: np.random.Generator,
) -> Pool:
    """Strata of equal numbers of pieces: by vision cost, then by tokens; within one the largest share first."""
    order_n = rng.permutation(len(tokens_n)).astype(np.int32)
    order_n = order_n[np.argsort(cost_n[order_n], kind="stable")]
    for band in np.array_split(order_n, VISION_STRATA):
        band[:] = band[np.argsort(tokens_n[band], kind="stable")]
    edges = np.unique(np.linspace(0, len(order_n), VISION_STRATA * TOKEN_STRATA + 1).astype(np.int64))
    for stratum in np.split(order_n, edges[1:-1]):
        share = np.maximum(tokens_n[stratum] / budget.S, cost_n[stratum] / (budget.N * budget.L))
        stratum[:] = stratum[np.argsort(-share, kind="stable")]
    largest_n = (_largest_per_piece(images)[order_n] >> shift).astype(np.int32)
    tokens_n = tokens_n[order_n].astype(np.int32)
    vision_n, cost_n = ((column[order_n] >> shift).astype(np.int32) for column in (vision_n, cost_n))
    return Pool(tokens_n, vision_n, largest_n, cost_n, order_n, edges[:-1].copy(), edges[1:].copy())
