"""How full packs can be at all, by linear programming, beside what the packer reaches.

    python benchmarks/packing_bound.py --lengths LENGTHS.py          # scipy: pip install -e '.[dev]'

The pieces of `benchmarks/packing.py`, m = 1, a cap of 256, one row per pack, for each L. Pieces are rounded down to
classes, which only makes them easier to pack. Over all ways to fill one pack with classes, the least number of packs
(fractions of packs allowed) that takes all pieces is a linear program; its columns are made as needed:

    prices of the classes --knapsack over (tokens, patches)--> the most valuable packs --program--> new prices

Whatever the prices, no pack is worth more than the knapsack says, so that the worth of all pieces divided by it is a
number of packs that no packer can go below: the bound holds wherever the search stops. Worths are integers.
"""

from __future__ import annotations

import argparse
import heapq
import json
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from geometry import load_module
from packing import Ints, Pieces, make_pieces, measure
from scipy.optimize import linprog
from scipy.sparse import csc_array

from preprocess.packing import pack_pieces
from shared.geometry import Budget

S = 4096
TOKEN_UNIT = 8  # tokens are rounded down to multiples, patches are not
ONE = 1 << 22  # the worth of a full pack
GAP = 1e-3  # the search ends this near to the program's optimum
PACKS_PER_ROUND = 120


class Classes(NamedTuple):
    """`count_c` pieces of at least `tokens_c` units and `patches_c` patches."""

    tokens_c: Ints
    patches_c: Ints
    count_c: Ints


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=Path, required=True, help="module with the length tables")
    parser.add_argument("--samples", type=int, default=65_536)
    parser.add_argument("--classes", type=int, default=600)
    parser.add_argument("--L", type=int, nargs="+", default=list(range(2304, 2500, 32)))
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    tables = load_module(options.lengths)
    rows: list[dict[str, float]] = []
    print(
        "   L   sums allow: tokens  patches   a packer: tokens  patches   ours: tokens  patches   left after rounding"
    )
    for L in options.L:
        pieces = make_pieces(tables, options.samples, 1, 256, Budget(S=S, N=1, L=L))
        rows.append(measure_bound(pieces, L, options.classes))
        print(
            "{L:5} {sums_tokens:19.2%} {sums_patches:8.2%} {bound_tokens:18.2%} {bound_patches:8.2%} "
            "{tokens:14.2%} {patches:8.2%} {kept_tokens:13.2%} {kept_patches:7.2%}".format(**rows[-1]),
            flush=True,
        )
    if options.json:
        print(json.dumps(rows))


def measure_bound(pieces: Pieces, L: int, number: int) -> dict[str, float]:
    """Fills that the sums alone, the program and the packer give; what the rounding left of the sums."""
    budget = Budget(S=S, N=1, L=L)

    def packer(own: Pieces) -> tuple[Ints, Ints]:
        packing = pack_pieces(own.tokens_n, own.offset_n, own.patches_i, budget)
        return packing.pack_n, packing.row_i

    ours = measure(pieces, packer, budget, len(pieces.tokens_n))
    tokens, patches = pieces.tokens_n.sum(), pieces.patches_i.sum()
    classes = round_down(pieces.tokens_n // TOKEN_UNIT, pieces.vision_n, S // TOKEN_UNIT, L, number)
    sums = max(tokens / S, patches / L)
    packs = max(sums, least_packs(classes, S // TOKEN_UNIT, L))
    return {
        "L": L,
        "sums_tokens": float(tokens / S / sums),
        "sums_patches": float(patches / L / sums),
        "bound_tokens": float(tokens / S / packs),
        "bound_patches": float(patches / L / packs),
        "tokens": ours["tokens"],
        "patches": ours["patches"],
        "kept_tokens": float((classes.tokens_c * classes.count_c).sum() * TOKEN_UNIT / tokens),
        "kept_patches": float((classes.patches_c * classes.count_c).sum() / patches),
    }


def round_down(tokens_n: Ints, patches_n: Ints, most_tokens: int, most_patches: int, number: int) -> Classes:
    """At most `number` boxes around the pieces; each piece counts as the lower corner of its box.

    The box whose best cut saves most is cut next; saved are shares of a pack.
    """
    both_k, count_k = np.unique(np.stack([tokens_n, patches_n]), axis=1, return_counts=True)
    scale = (most_tokens, most_patches)
    everything = np.arange(len(count_k))
    heap = [(*_best_cut(both_k, count_k, scale), 0, everything)]
    made = 1
    while len(heap) < number and heap[0][0] < 0:
        _, axis, edge, _, box = heapq.heappop(heap)
        below = both_k[axis, box] < edge
        for part in (box[below], box[~below]):
            heapq.heappush(heap, (*_best_cut(both_k[:, part], count_k[part], scale), made, part))
            made += 1
    corners = [(*both_k[:, box].min(1), count_k[box].sum()) for *_, box in heap]
    return Classes(*np.array(corners, np.int64).T)


def _best_cut(both_k: Ints, count_k: Ints, scale: tuple[int, int]) -> tuple[float, int, int]:
    """What the best cut of a box saves (negative), its axis and its edge: below go the smaller ones."""
    best = (0.0, 0, 0)
    for axis in (0, 1):
        order = np.argsort(both_k[axis], kind="stable")
        own, other, count = both_k[axis, order], both_k[1 - axis, order], count_k[order]
        edges = np.flatnonzero(own[1:] != own[:-1]) + 1
        if not len(edges):
            continue
        below = np.cumsum(count)[edges - 1]
        above = count.sum() - below
        saved = above * (own[edges] - own[0]) / scale[axis]
        # The other axis: either part has a corner of its own.
        low = np.minimum.accumulate(other)[edges - 1] - other.min()
        high = np.minimum.accumulate(other[::-1])[::-1][edges] - other.min()
        saved = saved + (below * low + above * high) / scale[1 - axis]
        at = int(saved.argmax())
        best = min(best, (-float(saved[at]), axis, int(own[edges[at]])))
    return best


def least_packs(classes: Classes, most_tokens: int, most_patches: int) -> float:
    """A number of packs that no packer can go below, to within GAP of what the program gives."""
    tokens_c, patches_c, count_c = classes
    assert (tokens_c + patches_c).all(), "a class was rounded down to nothing: the unit is too large"
    alone = np.minimum(most_tokens // np.maximum(tokens_c, 1), most_patches // np.maximum(patches_c, 1))
    packs: dict[bytes, Ints] = {}
    for c in range(len(count_c)):
        add_pack(packs, np.where(np.arange(len(count_c)) == c, alone[c], 0))
    worth_tp = np.zeros((most_tokens + 1, most_patches + 1), np.int32)
    best, center_c = 0.0, np.zeros(len(count_c))
    while True:
        program = linprog(
            np.ones(len(packs)),
            A_ub=-csc_array(np.array(list(packs.values())).T),
            b_ub=-count_c,
            method="highs",
        )
        dual_c = -program.ineqlin.marginals
        new = 0
        # Half way to the best prices so far: those of the program alone jump from round to round.
        for price_c in ((dual_c + center_c) / 2, dual_c) if best else (dual_c,):
            worth_c = np.floor(price_c * ONE).astype(np.int32)
            worth_of_packs(tokens_c, patches_c, worth_c, worth_tp)
            lower = float((worth_c.astype(np.int64) * count_c).sum() / worth_tp[-1, -1])
            if lower > best:
                best, center_c = lower, price_c
            new = sum(
                add_pack(packs, pack_c)
                for pack_c in valuable_packs(classes, worth_c, worth_tp)
                if (dual_c * pack_c).sum() > 1 + 1e-7
            )
            if new:
                break
        if program.fun <= best * (1 + GAP) or not new:
            return best


def add_pack(packs: dict[bytes, Ints], pack_c: Ints) -> bool:
    new = pack_c.tobytes() not in packs
    packs[pack_c.tobytes()] = pack_c
    return new


def valuable_packs(
    classes: Classes, worth_c: npt.NDArray[np.int32], worth_tp: npt.NDArray[np.int32]
) -> list[Ints]:
    """The most valuable packs among the best with one piece of each class."""
    tokens_c, patches_c, _ = classes
    left = worth_tp.shape[0] - 1 - tokens_c, worth_tp.shape[1] - 1 - patches_c
    total_c = np.where(worth_c > 0, worth_tp[left].astype(np.int64) + worth_c, 0)
    found: list[Ints] = []
    for c in np.argsort(-total_c, kind="stable")[:PACKS_PER_ROUND].tolist():
        pack_c = np.zeros(len(worth_c), np.int64)
        pack_c[c] = 1
        read_pack(tokens_c, patches_c, worth_c, worth_tp, int(left[0][c]), int(left[1][c]), pack_c)
        found.append(pack_c)
    return found


@numba.njit(cache=True)
def worth_of_packs(
    tokens_c: Ints, patches_c: Ints, worth_c: npt.NDArray[np.int32], worth_tp: npt.NDArray[np.int32]
) -> None:
    """Fill `worth_tp`: the most that pieces of at most t units of tokens and p patches are worth."""
    worth_tp[0] = 0
    for t in range(worth_tp.shape[0]):
        row = worth_tp[t]
        if t:
            row[:] = worth_tp[t - 1]
        for c in range(len(worth_c)):
            if tokens_c[c] <= t and worth_c[c] > 0:
                before, worth, patches = worth_tp[t - tokens_c[c]], worth_c[c], patches_c[c]
                for p in range(patches, worth_tp.shape[1]):
                    value = before[p - patches] + worth
                    row[p] = value if value > row[p] else row[p]


@numba.njit(cache=True)
def read_pack(
    tokens_c: Ints,
    patches_c: Ints,
    worth_c: npt.NDArray[np.int32],
    worth_tp: npt.NDArray[np.int32],
    t: int,
    p: int,
    pack_c: Ints,
) -> None:
    """Add to `pack_c` the pieces that `worth_tp[t, p]` is made of."""
    while worth_tp[t, p] > 0:
        if t > 0 and worth_tp[t - 1, p] == worth_tp[t, p]:
            t -= 1
            continue
        for c in range(len(worth_c)):
            fits = worth_c[c] > 0 and tokens_c[c] <= t and patches_c[c] <= p
            if fits and worth_tp[t - tokens_c[c], p - patches_c[c]] + worth_c[c] == worth_tp[t, p]:
                pack_c[c] += 1
                t, p = t - tokens_c[c], p - patches_c[c]
                break


if __name__ == "__main__":
    main()
