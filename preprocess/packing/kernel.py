"""Packs filled one after another from the pool of pieces. Compiled; the package's page tells the idea.

For every pack: the largest piece left, then piece after piece along the pool's direction, sooner those of strata
that lag behind, and at each step from which two more pieces could finish it, a search for the pair that leaves least.
The best end found on the way is taken, and what was put in after it goes back.

    pieces: what they take
    vision rows: which row takes which image
    tops: the pieces that a pack may take next, and the scans over them
    packs: the search

One file, because numba's cache notices a change only in the file of the function that it keeps.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from preprocess.packing.compiled import compiled

# Pieces.


class Limits(NamedTuple):
    """The budget as plain integers. The pool counts 2**shift patches as one, so that a pack's fit 30 bits.

    `one_row`: the vision rows are one number, what is left of a single row that takes any number of images.
    """

    S: int
    N: int
    L: int
    images_per_row: int
    shift: int
    one_row: bool


class Pieces(NamedTuple):
    """The input: piece n has `tokens_n` tokens and the images [offset_n[n], offset_n[n + 1]).

    `row_i` receives the row of each image. `order_i` lists those of a piece largest first, as numbers inside the
    piece; it is empty where `one_row` asks for no order.
    """

    tokens_n: npt.NDArray[np.int64]
    offset_n: npt.NDArray[np.int64]
    patches_i: npt.NDArray[np.int64]
    order_i: npt.NDArray[np.int32]
    row_i: npt.NDArray[np.int32]


COST, TOKENS, SHARE = range(3)
NUMBER = (1 << 32) - 1  # the low half of a key


@compiled
def vision_of(piece: int, pieces: Pieces, limits: Limits) -> tuple[int, int, int]:
    """Patches of a piece, of its largest image, and what it takes of the vision rows, in the pool's units.

    Where a row holds few pieces, each takes its part of a row at least.
    """
    least = limits.L // limits.images_per_row if limits.images_per_row else 0
    patches, largest, cost = 0, 0, 0
    for image in range(pieces.offset_n[piece], pieces.offset_n[piece + 1]):
        own = pieces.patches_i[image]
        patches += own
        largest = max(largest, own)
        cost += max(own, least)
    return patches >> limits.shift, largest >> limits.shift, cost >> limits.shift


@compiled
def rank_by(measure: int, key_n: npt.NDArray[np.int64], pieces: Pieces, limits: Limits) -> int:
    """Put a measure above the number of the piece in each key, for a sort in place; the sum of the costs.

    By SHARE the largest comes first, by COST and TOKENS the smallest. Equal ones stay in the order of the input.
    """
    total = 0
    for at in range(len(key_n)):
        piece = key_n[at] & NUMBER
        cost = vision_of(piece, pieces, limits)[2]
        total += cost
        value = cost
        if measure == TOKENS:
            value = pieces.tokens_n[piece]
        elif measure == SHARE:
            share = max(pieces.tokens_n[piece] / limits.S, cost / vision_of_pack(limits))
            value = int((1 - share) * (1 << 30))
        key_n[at] = (value << 32) | piece
    return total


@compiled
def order_images(pieces: Pieces) -> None:
    """Fill `order_i`, equal images in document order. Few images to a piece: sorted by insertion."""
    for piece in range(len(pieces.tokens_n)):
        start = pieces.offset_n[piece]
        for at in range(start, pieces.offset_n[piece + 1]):
            own = pieces.patches_i[at]
            hole = at
            while hole > start and pieces.patches_i[start + pieces.order_i[hole - 1]] < own:
                pieces.order_i[hole] = pieces.order_i[hole - 1]
                hole -= 1
            pieces.order_i[hole] = at - start


@compiled
def vision_of_pack(limits: Limits) -> int:
    """N * L, in the pool's units."""
    return (limits.N * limits.L) >> limits.shift


# Vision rows. An image goes to the fullest row that takes it, as `stream.split_sample` assumes. A row that holds
# `images_per_row` images counts as full; 0 is no bound.


class Rows(NamedTuple):
    """`free_N`: patches each row still takes; `count_N`: images it holds; `before_N2`: scratch to undo into."""

    free_N: npt.NDArray[np.int64]
    count_N: npt.NDArray[np.int64]
    before_N2: npt.NDArray[np.int64]


def empty_rows(N: int, L: int) -> Rows:
    return Rows(np.full(N, L, np.int64), np.zeros(N, np.int64), np.zeros((N, 2), np.int64))


@compiled
def copy_rows(source: Rows, target: Rows) -> None:
    for row in range(len(source.free_N)):
        target.free_N[row] = source.free_N[row]
        target.count_N[row] = source.count_N[row]


@compiled
def place_images(piece: int, pieces: Pieces, rows: Rows, images_per_row: int) -> bool:
    """Put all images of a piece into rows, or none: after False `rows` is as it was.

    Largest image first; if that fails in document order, as the sample was cut (`stream.split_sample`): what
    fitted there fits an empty pack here.
    """
    if pieces.offset_n[piece + 1] - pieces.offset_n[piece] <= 1:
        return _place_in_order(piece, False, pieces, rows, images_per_row)
    for row in range(len(rows.free_N)):
        rows.before_N2[row, 0], rows.before_N2[row, 1] = rows.free_N[row], rows.count_N[row]
    for largest_first in (True, False):
        if _place_in_order(piece, largest_first, pieces, rows, images_per_row):
            return True
        for row in range(len(rows.free_N)):
            rows.free_N[row], rows.count_N[row] = rows.before_N2[row, 0], rows.before_N2[row, 1]
    return False


@compiled
def _place_in_order(piece: int, largest_first: bool, pieces: Pieces, rows: Rows, images_per_row: int) -> bool:
    start = pieces.offset_n[piece]
    for at in range(start, pieces.offset_n[piece + 1]):
        image = start + pieces.order_i[at] if largest_first else at
        row = _tightest_row(rows, pieces.patches_i[image])
        if row < 0:
            return False
        rows.free_N[row] -= pieces.patches_i[image]
        rows.count_N[row] += 1
        if rows.count_N[row] == images_per_row:
            rows.free_N[row] = 0
        pieces.row_i[image] = row
    return True


@compiled
def _tightest_row(rows: Rows, patches: int) -> int:
    """The fullest row that takes an image, the first of equals; -1 for none."""
    best = -1
    for row in range(len(rows.free_N)):
        free = rows.free_N[row]
        if free >= patches and (best < 0 or free < rows.free_N[best]):
            best = row
    return best


@compiled
def patches_left(rows: Rows) -> tuple[int, int]:
    """In all rows, and in the freest."""
    total, widest = 0, 0
    for row in range(len(rows.free_N)):
        total += rows.free_N[row]
        widest = max(widest, rows.free_N[row])
    return total, widest


# Tops. The scans over them do nearly all the work of the packer. They are written for the vector unit: 32-bit
# integers, no branch, and a refusal value that differs from the starting one (with the same value LLVM turns the
# selection into a branch, and the scan takes ten times as long). A second scan finds the place of the best: one that
# stops there takes three times as long. Results leave as `0 + value`, 64 bits wide.

Int = np.int32
UNIT = 1 << 16  # x and y of what a pack aims to hold
PRICE = 1 << 8
FARTHEST = 4 * UNIT  # x and y are bounded, so that no product leaves 32 bits
NEVER = np.int32(2**31 - 1)
REFUSED = np.int32(2**30)
# How much a step away from the pool's direction weighs against the size of the piece; 4 to 40 give the same fill
# within 0.3 %.
BALANCE = np.int32(12)
STRANDED = np.int32(8)
# A stratum of which a thirty-second more is left than of all pieces counts double as first piece of a pack; 16 fills
# up to 0.1 % less.
LAG_GAIN = 32.0
LEAST_LAG, MOST_LAG = -230, 768  # in LAG_UNITs: a factor of 0.1 to 4
LAG_UNIT = np.int32(256)
# What a lag weighs against size and direction: of one LAG_UNIT, a sixth of the aim.
LAG_WEIGHT = np.int32(40)
# Packs between two looks at the lags; a look before each gives the same fill within 0.1 %.
LAG_FOR = 8


class Pool(NamedTuple):
    """Pieces, one stratum after another, the largest first in each; stratum c has [next_c[c], end_c[c]) left."""

    piece_n: npt.NDArray[np.int32]
    next_c: npt.NDArray[np.int64]
    end_c: npt.NDArray[np.int64]


class Tops(NamedTuple):
    """The first piece left of each stratum; `tokens_c` is NEVER for none, and for one not to be taken now.

    `patches_c`, `largest_c`, `cost_c`: see `vision_of`. `share_c`: the larger share of S and of the vision rows, in
    2**-30. `x_c`, `y_c`: tokens and vision cost in UNITs of what the pack aims to hold of each. `gap_c`: what its
    largest image would leave useless in a vision row, in UNITs of the vision aim. `lag_c`: how far the stratum lags
    behind the pool, in LAG_UNITs; see `measure_lags`.
    """

    tokens_c: npt.NDArray[np.int32]
    patches_c: npt.NDArray[np.int32]
    largest_c: npt.NDArray[np.int32]
    cost_c: npt.NDArray[np.int32]
    share_c: npt.NDArray[np.int32]
    x_c: npt.NDArray[np.int32]
    y_c: npt.NDArray[np.int32]
    gap_c: npt.NDArray[np.int32]
    lag_c: npt.NDArray[np.int32]


class Aim(NamedTuple):
    """UNITs per token and per patch of vision cost, price of each budget left empty, and the waste that is
    good enough."""

    x_per_token: float
    y_per_cost: float
    price_x: np.int32
    price_y: np.int32
    enough: int


class Room(NamedTuple):
    """What a pack still takes: tokens, patches in all rows and in the freest; x and y up to the aim."""

    tokens: np.int32
    patches: np.int32
    widest: np.int32
    x: np.int32
    y: np.int32


@compiled
def room_of(tokens: int, patches: int, widest: int, x: int, y: int) -> Room:
    x = min(max(x, -2 * FARTHEST), FARTHEST)
    y = min(max(y, -2 * FARTHEST), FARTHEST)
    return Room(Int(tokens), Int(patches), Int(widest), Int(x), Int(y))


@compiled
def waste(room: Room, aim: Aim) -> int:
    return int(aim.price_x) * int(max(room.x, 0)) + int(aim.price_y) * int(max(room.y, 0))


@compiled
def size(c: int, tops: Tops, aim: Aim) -> int:
    return int(aim.price_x) * tops.x_c[c] + int(aim.price_y) * tops.y_c[c]


@compiled
def show_top(c: int, pool: Pool, tops: Tops, pieces: Pieces, aim: Aim, limits: Limits) -> None:
    at = pool.next_c[c]
    if at == pool.end_c[c]:
        tops.tokens_c[c] = NEVER
        return
    piece = int(pool.piece_n[at])
    patches, largest, cost = vision_of(piece, pieces, limits)
    tokens = pieces.tokens_n[piece]
    tops.tokens_c[c], tops.patches_c[c], tops.largest_c[c], tops.cost_c[c] = tokens, patches, largest, cost
    tops.share_c[c] = Int(max(tokens / limits.S, cost / vision_of_pack(limits)) * (1 << 30))
    measure_top(c, tops, aim)


@compiled
def measure_top(c: int, tops: Tops, aim: Aim) -> None:
    tops.x_c[c] = Int(min(tops.tokens_c[c] * aim.x_per_token, FARTHEST))
    tops.y_c[c] = Int(min(tops.cost_c[c] * aim.y_per_cost, FARTHEST))


@compiled
def measure_lags(pool: Pool, tops: Tops, mean: float) -> None:
    """Fill `lag_c` from the pieces left of each stratum and what would be `mean`, had all kept pace."""
    for c in range(len(tops.lag_c)):
        lag = (pool.end_c[c] - pool.next_c[c] + 0.5) / (mean + 0.5) - 1
        tops.lag_c[c] = Int(min(max(lag * LAG_GAIN * LAG_UNIT, LEAST_LAG), MOST_LAG))


@compiled
def may_fit(c: int, tops: Tops, room: Room) -> bool:
    """Exact for tokens, and for images where `one_row`; else a sieve that lets pass whatever fits the rows."""
    return (
        (tops.tokens_c[c] <= room.tokens)
        & (tops.patches_c[c] <= room.patches)
        & (tops.largest_c[c] <= room.widest)
    )


@compiled
def first_top(tops: Tops) -> int:
    """The top with the largest share of a budget, more where its stratum lags; the first of equals, -1 for none."""
    largest, first = Int(-1), NEVER
    for c in range(len(tops.share_c)):
        share = Int(Int(tops.share_c[c] >> 12) * Int(LAG_UNIT + Int(min(tops.lag_c[c], LAG_UNIT))))
        largest = share if share > largest else largest
    for c in range(len(tops.share_c)):
        share = Int(Int(tops.share_c[c] >> 12) * Int(LAG_UNIT + Int(min(tops.lag_c[c], LAG_UNIT))))
        at = Int(c) if share == largest else REFUSED
        first = at if at < first else first
    return int(0 + first)


@compiled
def median_image(tops: Tops) -> int:
    """Of the largest images of the tops: a gap in a row that is below it is hard to fill. `gap_c` is scratch."""
    ordered_c = tops.gap_c
    for c in range(len(ordered_c)):
        own, hole = tops.largest_c[c], c
        while hole > 0 and ordered_c[hole - 1] > own:
            ordered_c[hole] = ordered_c[hole - 1]
            hole -= 1
        ordered_c[hole] = own
    return int(0 + ordered_c[len(ordered_c) // 2])


@compiled
def measure_gaps(rows: Rows, shift: int, usual_image: int, tops: Tops, aim: Aim) -> None:
    """Fill `gap_c`: what the fullest row that takes the top's largest image has left then, if below `usual_image`."""
    smallest = NEVER
    for c in range(len(tops.gap_c)):
        tops.gap_c[c] = NEVER
        image = tops.largest_c[c] if tops.largest_c[c] > 0 else REFUSED
        smallest = image if image < smallest else smallest
    for row in range(len(rows.free_N)):
        free = Int(rows.free_N[row] >> shift)
        if free < smallest or (row > 0 and rows.free_N[row] == rows.free_N[row - 1]):
            continue  # takes no image, or what the row before does: most rows
        for c in range(len(tops.gap_c)):
            left = Int(free - tops.largest_c[c])
            left = left if left >= 0 else REFUSED
            tops.gap_c[c] = left if left < tops.gap_c[c] else tops.gap_c[c]
    for c in range(len(tops.gap_c)):
        gap = tops.gap_c[c] if (tops.gap_c[c] < usual_image) & (tops.largest_c[c] > 0) else 0
        tops.gap_c[c] = Int(min(gap * aim.y_per_cost, FARTHEST))


@compiled
def next_top(tops: Tops, room: Room, aim: Aim) -> tuple[int, int]:
    """The largest piece that keeps what is left of the pack on the pool's direction, or -1; the largest size.

    One whose stratum lags may be smaller or farther off.
    """
    best, largest = -NEVER, Int(-1)
    ahead = Int(room.x - room.y)
    for c in range(len(tops.tokens_c)):
        bend = Int(Int(ahead - tops.x_c[c]) + tops.y_c[c])
        bend = bend if bend > 0 else Int(-bend)
        score = Int(Int(tops.x_c[c] + tops.y_c[c]) - Int(BALANCE * bend) - Int(STRANDED * tops.gap_c[c]))
        score = Int(score + Int(LAG_WEIGHT * tops.lag_c[c]))
        score = score if may_fit(c, tops, room) else Int(-REFUSED)
        best = score if score > best else best
        priced = Int(Int(aim.price_x * tops.x_c[c]) + Int(aim.price_y * tops.y_c[c]))
        priced = priced if may_fit(c, tops, room) else Int(0)
        largest = priced if priced > largest else largest
    if best <= -REFUSED:
        return -1, 0
    first = NEVER
    for c in range(len(tops.tokens_c)):
        bend = Int(Int(ahead - tops.x_c[c]) + tops.y_c[c])
        bend = bend if bend > 0 else Int(-bend)
        score = Int(Int(tops.x_c[c] + tops.y_c[c]) - Int(BALANCE * bend) - Int(STRANDED * tops.gap_c[c]))
        score = Int(score + Int(LAG_WEIGHT * tops.lag_c[c]))
        at = Int(c) if (score == best) & may_fit(c, tops, room) else REFUSED
        first = at if at < first else first
    return int(0 + first), int(0 + largest)


@compiled
def least_waste(tops: Tops, room: Room, aim: Aim) -> int:
    """The waste that the best single piece would leave; REFUSED or more if none fits."""
    best = NEVER
    for c in range(len(tops.tokens_c)):
        x, y = Int(room.x - tops.x_c[c]), Int(room.y - tops.y_c[c])
        x = x if x > 0 else Int(0)
        y = y if y > 0 else Int(0)
        left = Int(Int(aim.price_x * x) + Int(aim.price_y * y))
        left = left if may_fit(c, tops, room) else REFUSED
        best = left if left < best else best
    return int(0 + best)


@compiled
def top_that_leaves(target: int, tops: Tops, room: Room, aim: Aim) -> int:
    """The piece that `least_waste` found."""
    first = NEVER
    for c in range(len(tops.tokens_c)):
        x, y = Int(room.x - tops.x_c[c]), Int(room.y - tops.y_c[c])
        x = x if x > 0 else Int(0)
        y = y if y > 0 else Int(0)
        left = Int(Int(aim.price_x * x) + Int(aim.price_y * y))
        at = Int(c) if (left == target) & may_fit(c, tops, room) else REFUSED
        first = at if at < first else first
    return int(0 + first)


# Packs.

# A pack that is this close to its aim, both budgets added, is done: the small pieces that would fill it to the
# last token are worth more in a later pack. 0.002 to 0.01 give the same fill within 0.1 %.
ENOUGH = 0.005
# First pieces that a search for a pair tries; 16 fill 0.02 to 0.1 % more and take up to two fifths longer.
PAIR_STARTS = 8
# How the price of a budget follows its share of what is left: 1 % more of it, 10 % dearer. 30 gives the same.
PRICE_GAIN = 10.0
# Packs between two looks at the usual image.
USUAL_FOR = 16


class End(NamedTuple):
    """How a pack may end: its first `depth` pieces, then the tops `first` and `second` (-1: none)."""

    waste: int
    depth: int
    first: int
    second: int


class Work(NamedTuple):
    """Buffers of one pack: its rows, more of them to try pieces in, and the stratum of each piece."""

    rows: Rows
    trial: Rows
    chosen_d: npt.NDArray[np.int32]


def fill_packs(pool: Pool, pieces: Pieces, cost: int, pack_n: npt.NDArray[np.int32], limits: Limits) -> int:
    """Fill `pack_n` and `pieces.row_i`; return the number of packs, which are numbered as they are filled.

    Every piece fits an empty pack; `cost` is the sum of their costs.
    """
    tops = Tops(*np.zeros((len(Tops._fields), len(pool.next_c)), np.int32))
    least = int(pieces.tokens_n.min())
    deepest = min(len(pack_n), limits.S // least) if least else len(pack_n)
    chosen_d = np.empty(deepest + 2, np.int32)
    rows, trial = empty_rows(limits.N, limits.L), empty_rows(limits.N, limits.L)
    work = Work(rows, trial, chosen_d)
    left = np.array([pieces.tokens_n.sum(), cost], np.int64)
    packs = int(_fill_packs(pool, tops, pieces, pack_n, limits, work, left, left.copy()))
    assert packs >= 0, "a piece does not fit an empty pack"
    return packs


@compiled
def _fill_packs(
    pool: Pool,
    tops: Tops,
    pieces: Pieces,
    pack_n: npt.NDArray[np.int32],
    limits: Limits,
    work: Work,
    left: npt.NDArray[np.int64],
    at_first: npt.NDArray[np.int64],
) -> int:
    """Ends because each pack takes its first piece at least; -1 if one does not fit."""
    packs, placed, usual_image, emptied = 0, 0, 0, True
    per_stratum = len(pack_n) / len(pool.next_c)
    while placed < len(pack_n):
        aim = _aim(left, at_first, limits)
        if emptied:
            strata = _live_strata(pool)
            pool, tops = _first_strata(pool, strata), _first_tops(tops, strata)
            for c in range(strata):
                show_top(c, pool, tops, pieces, aim, limits)
        for c in range(len(tops.tokens_c)):
            measure_top(c, tops, aim)
        if emptied or packs % LAG_FOR == 0:
            measure_lags(pool, tops, per_stratum * (len(pack_n) - placed) / len(pack_n))
        if limits.N > 1 and packs % USUAL_FOR == 0:
            usual_image = median_image(tops)
        depth = _choose_pieces(pool, tops, pieces, aim, limits, work, usual_image, packs)
        if depth == 0:
            return -1
        _reset_rows(work.rows, limits.L)
        emptied = False
        for d in range(depth):
            c = work.chosen_d[d]
            piece = int(pool.piece_n[pool.next_c[c]])
            pool.next_c[c] += 1
            emptied = emptied or pool.next_c[c] == pool.end_c[c]
            left[0] -= pieces.tokens_n[piece]
            left[1] -= vision_of(piece, pieces, limits)[2]
            show_top(c, pool, tops, pieces, aim, limits)
            if not limits.one_row:
                # The same images in the same order as when the pack was chosen, hence into the same rows.
                place_images(piece, pieces, work.rows, limits.images_per_row)
            pack_n[piece] = packs
        placed += depth
        packs += 1
    return packs


@compiled
def _reset_rows(rows: Rows, L: int) -> None:
    for row in range(len(rows.free_N)):
        rows.free_N[row], rows.count_N[row] = L, 0


@compiled
def _live_strata(pool: Pool) -> int:
    """Move the strata that are not empty to the front; their number."""
    live = 0
    for c in range(len(pool.next_c)):
        if pool.next_c[c] < pool.end_c[c]:
            if live < c:
                pool.next_c[live], pool.end_c[live] = pool.next_c[c], pool.end_c[c]
            live += 1
    return live


@compiled
def _first_strata(pool: Pool, strata: int) -> Pool:
    return Pool(pool.piece_n, pool.next_c[:strata], pool.end_c[:strata])


@compiled
def _first_tops(tops: Tops, strata: int) -> Tops:
    return Tops(
        tops.tokens_c[:strata],
        tops.patches_c[:strata],
        tops.largest_c[:strata],
        tops.cost_c[:strata],
        tops.share_c[:strata],
        tops.x_c[:strata],
        tops.y_c[:strata],
        tops.gap_c[:strata],
        tops.lag_c[:strata],
    )


@compiled
def _aim(left: npt.NDArray[np.int64], at_first: npt.NDArray[np.int64], limits: Limits) -> Aim:
    """What a pack should hold: an equal part of what is left, if that fills as few packs as it can.

    The budget of which the pool holds more than at first has been left empty too often: its price rises.
    """
    x, y = left[0] / limits.S, left[1] / vision_of_pack(limits)
    packs = max(x, y, 1.0)
    rise = 0.0
    if left[0] > 0 and left[1] > 0:
        rise = (left[1] / left[0]) / (at_first[1] / at_first[0]) - 1
    rise = min(max(PRICE_GAIN * rise, -0.9), 0.9)
    x_per_token = UNIT * packs / left[0] if left[0] > 0 else 0.0
    y_per_cost = UNIT * packs / left[1] if left[1] > 0 else 0.0
    # The last pack takes all it can.
    enough = -1 if packs == 1.0 else int(ENOUGH * UNIT * PRICE)
    return Aim(x_per_token, y_per_cost, Int((1 - rise) * PRICE), Int((1 + rise) * PRICE), enough)


@compiled
def _put_top(c: int, pool: Pool, tops: Tops, pieces: Pieces, rows: Rows, limits: Limits) -> bool:
    """Put the images of a top that `may_fit` into rows, or none of them."""
    if limits.one_row:
        rows.free_N[0] -= tops.patches_c[c]
        return True
    if tops.largest_c[c] == tops.patches_c[c] and limits.images_per_row == 0 and limits.shift == 0:
        row = _tightest_row(rows, tops.patches_c[c])  # one image, or none: most pieces
        if row >= 0:
            rows.free_N[row] -= tops.patches_c[c]
        return row >= 0
    return place_images(int(pool.piece_n[pool.next_c[c]]), pieces, rows, limits.images_per_row)


@compiled
def _choose_pieces(
    pool: Pool,
    tops: Tops,
    pieces: Pieces,
    aim: Aim,
    limits: Limits,
    work: Work,
    usual_image: int,
    turn: int,
) -> int:
    """Strata of the next pack's pieces, in order, into `work.chosen_d`; their number. The pool is as before."""
    rows = work.rows
    _reset_rows(rows, limits.L)
    x, y = UNIT if aim.x_per_token > 0 else 0, UNIT if aim.y_per_cost > 0 else 0
    room = room_of(limits.S, vision_of_pack(limits), limits.L >> limits.shift, x, y)
    best = End(1 << 60, 0, -1, -1)
    depth, failed, top = 0, 0, first_top(tops)
    while top >= 0:
        if _put_top(top, pool, tops, pieces, rows, limits):
            room = _room_after(top, tops, rows, room, limits)
            work.chosen_d[depth] = top
            depth += 1
            pool.next_c[top] += 1
            show_top(top, pool, tops, pieces, aim, limits)
        else:
            tops.tokens_c[top] = NEVER  # not in this pack: its images do not fit the rows
            failed += 1
        wasted = waste(room, aim)
        # A piece too small for UNIT to tell from nothing goes along, or packs would hold one each.
        if wasted < best.waste or (wasted == best.waste and best.depth == depth - 1 and best.first < 0):
            best = End(wasted, depth, -1, -1)
        if limits.N > 1:
            measure_gaps(rows, limits.shift, usual_image, tops, aim)
        top, largest = next_top(tops, room, aim)
        if top >= 0 and best.waste >= aim.enough and waste(room, aim) <= 2 * largest + max(aim.enough, 0):
            best = _best_pair(pool, tops, pieces, aim, limits, work, room, best, depth, largest, turn)
        if best.waste < aim.enough:
            break
    for d in range(depth):
        pool.next_c[work.chosen_d[d]] -= 1
    _show_again(depth, failed, pool, tops, pieces, aim, limits, work)
    depth = best.depth
    for top in (best.first, best.second):
        if top >= 0:
            work.chosen_d[depth] = top
            depth += 1
    return depth


@compiled
def _show_again(
    depth: int, failed: int, pool: Pool, tops: Tops, pieces: Pieces, aim: Aim, limits: Limits, work: Work
) -> None:
    """The tops as they were before the pack was chosen."""
    if failed:
        for c in range(len(tops.tokens_c)):
            show_top(c, pool, tops, pieces, aim, limits)
    else:
        for d in range(depth):
            show_top(work.chosen_d[d], pool, tops, pieces, aim, limits)


@compiled
def _room_after(c: int, tops: Tops, rows: Rows, room: Room, limits: Limits) -> Room:
    """With a top's images in `rows`."""
    patches, widest = patches_left(rows)
    x, y = room.x - tops.x_c[c], room.y - tops.y_c[c]
    return room_of(room.tokens - tops.tokens_c[c], patches >> limits.shift, widest >> limits.shift, x, y)


@compiled
def _best_pair(
    pool: Pool,
    tops: Tops,
    pieces: Pieces,
    aim: Aim,
    limits: Limits,
    work: Work,
    room: Room,
    best: End,
    depth: int,
    largest: int,
    turn: int,
) -> End:
    """The better of `best` and the best end with one or two of the tops; every call starts from other tops."""
    step = max(1, len(tops.tokens_c) // PAIR_STARTS)
    for first in range((7 * turn + 3 * depth) % step, len(tops.tokens_c), step):
        if (
            not may_fit(first, tops, room)
            or waste(room, aim) - size(first, tops, aim) - largest >= best.waste
        ):
            continue
        copy_rows(work.rows, work.trial)
        if not _put_top(first, pool, tops, pieces, work.trial, limits):
            continue
        after = _room_after(first, tops, work.trial, room, limits)
        if waste(after, aim) < best.waste:
            best = End(waste(after, aim), depth, first, -1)
        hidden = tops.tokens_c[first]
        tops.tokens_c[first] = NEVER
        least = least_waste(tops, after, aim)
        if least < best.waste:
            second = top_that_leaves(least, tops, after, aim)
            if _put_top(second, pool, tops, pieces, work.trial, limits):
                best = End(least, depth, first, second)
        tops.tokens_c[first] = hidden
        if best.waste < aim.enough:
            break
    return best
