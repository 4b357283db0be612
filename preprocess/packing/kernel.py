"""Packs filled one after another from the pool of pieces. Compiled; the package's page tells the idea.

For every pack: the largest piece left, then piece after piece along the pool's direction, and at each step from
which two more pieces could finish it, a search for the pair that leaves least. The best end found on the way is
taken, and what was put in after it goes back.

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

# Vision rows. An image goes to the fullest row that takes it, as `stream.split_sample` assumes. A row that holds
# `images_per_row` images counts as full; 0 is no bound.


class Images(NamedTuple):
    """Images of all pieces: piece n has [offset_n[n], offset_n[n + 1]).

    `sorted_i` lists them largest first within each piece; `row_i` receives the row of each.
    """

    offset_n: npt.NDArray[np.int64]
    patches_i: npt.NDArray[np.int64]
    sorted_i: npt.NDArray[np.int32]
    row_i: npt.NDArray[np.int32]


class Rows(NamedTuple):
    """`free_N`: patches each row still takes; `count_N`: images it holds; `before_N2`: scratch to undo into."""

    free_N: npt.NDArray[np.int64]
    count_N: npt.NDArray[np.int64]
    before_N2: npt.NDArray[np.int64]


@compiled
def empty_rows(N: int, L: int) -> Rows:
    return Rows(np.full(N, L, np.int64), np.zeros(N, np.int64), np.zeros((N, 2), np.int64))


@compiled
def copy_rows(source: Rows, target: Rows) -> None:
    for row in range(len(source.free_N)):
        target.free_N[row] = source.free_N[row]
        target.count_N[row] = source.count_N[row]


@compiled
def place_images(piece: int, images: Images, rows: Rows, images_per_row: int) -> bool:
    """Put all images of a piece into rows, or none: after False `rows` is as it was.

    Largest image first; if that fails in document order, as the sample was cut (`stream.split_sample`): what
    fitted there fits an empty pack here.
    """
    for row in range(len(rows.free_N)):
        rows.before_N2[row, 0], rows.before_N2[row, 1] = rows.free_N[row], rows.count_N[row]
    for largest_first in (True, False):
        if _place_in_order(piece, largest_first, images, rows, images_per_row):
            return True
        for row in range(len(rows.free_N)):
            rows.free_N[row], rows.count_N[row] = rows.before_N2[row, 0], rows.before_N2[row, 1]
    return False


@compiled
def _place_in_order(piece: int, largest_first: bool, images: Images, rows: Rows, images_per_row: int) -> bool:
    for at in range(images.offset_n[piece], images.offset_n[piece + 1]):
        image = images.sorted_i[at] if largest_first else at
        row = _tightest_row(rows, images.patches_i[image])
        if row < 0:
            return False
        rows.free_N[row] -= images.patches_i[image]
        rows.count_N[row] += 1
        if rows.count_N[row] == images_per_row:
            rows.free_N[row] = 0
        images.row_i[image] = row
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
def room_after(
    piece: int, images: Images, rows: Rows, trial: Rows, images_per_row: int
) -> tuple[bool, int, int]:
    """Whether a piece's images fit, and what would be left then: patches of all rows, and of the freest."""
    start, end = images.offset_n[piece], images.offset_n[piece + 1]
    if end - start > 1 or images_per_row:
        copy_rows(rows, trial)
        fits = place_images(piece, images, trial, images_per_row)
        return fits, trial.free_N.sum(), trial.free_N.max()
    patches = int(images.patches_i[start]) if end > start else 0  # most pieces: no copy, one pass
    chosen = _tightest_row(rows, patches)
    total, widest = 0, 0
    for row in range(len(rows.free_N)):
        free = rows.free_N[row] - (patches if row == chosen else 0)
        total += free
        widest = max(widest, free)
    return chosen >= 0, total, widest


# Tops. The scans over them do nearly all the work of the packer. They are written for the vector unit: 32-bit
# integers, no branch, and a refusal value that differs from the starting one (with the same value LLVM turns the
# selection into a branch, and the scan takes ten times as long).

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


class Pool(NamedTuple):
    """Pieces, one stratum after another, the largest first in each; stratum c has [next_c[c], end_c[c]) left.

    `cost_n` is what a piece takes of the vision rows, `largest_n` its largest image, `piece_n` its number.
    """

    tokens_n: npt.NDArray[np.int32]
    patches_n: npt.NDArray[np.int32]
    largest_n: npt.NDArray[np.int32]
    cost_n: npt.NDArray[np.int32]
    piece_n: npt.NDArray[np.int32]
    next_c: npt.NDArray[np.int64]
    end_c: npt.NDArray[np.int64]


class Tops(NamedTuple):
    """The first piece left of each stratum; `tokens_c` is NEVER for none, and for one not to be taken now.

    `x_c`, `y_c`: tokens and vision cost in UNITs of what the pack aims to hold of each. `gap_c`: what its
    largest image would leave useless in a vision row, in UNITs of the vision aim.
    """

    tokens_c: npt.NDArray[np.int32]
    patches_c: npt.NDArray[np.int32]
    largest_c: npt.NDArray[np.int32]
    cost_c: npt.NDArray[np.int32]
    x_c: npt.NDArray[np.int32]
    y_c: npt.NDArray[np.int32]
    gap_c: npt.NDArray[np.int32]


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
def show_top(c: int, pool: Pool, tops: Tops, aim: Aim) -> None:
    at = pool.next_c[c]
    if at == pool.end_c[c]:
        tops.tokens_c[c] = NEVER
        return
    tops.tokens_c[c] = pool.tokens_n[at]
    tops.patches_c[c] = pool.patches_n[at]
    tops.largest_c[c] = pool.largest_n[at]
    tops.cost_c[c] = pool.cost_n[at]
    measure_top(c, tops, aim)


@compiled
def measure_top(c: int, tops: Tops, aim: Aim) -> None:
    tops.x_c[c] = Int(min(tops.tokens_c[c] * aim.x_per_token, FARTHEST))
    tops.y_c[c] = Int(min(tops.cost_c[c] * aim.y_per_cost, FARTHEST))


@compiled
def top_piece(c: int, pool: Pool) -> int:
    return int(pool.piece_n[pool.next_c[c]])


@compiled
def may_fit(c: int, tops: Tops, room: Room) -> bool:
    """Exact for tokens; for images a sieve that lets pass whatever fits the rows."""
    return (
        (tops.tokens_c[c] <= room.tokens)
        & (tops.patches_c[c] <= room.patches)
        & (tops.largest_c[c] <= room.widest)
    )


@compiled
def median_image(tops: Tops) -> int:
    """Of the largest images of the tops: a gap in a row that is below it is hard to fill."""
    return int(np.median(tops.largest_c))


@compiled
def measure_gaps(rows: Rows, shift: int, image: int, tops: Tops, aim: Aim) -> None:
    """Fill `gap_c`: what the fullest row that takes the top's largest image has left then, if below `image`."""
    tops.gap_c[:] = NEVER
    for row in range(len(rows.free_N)):
        free = Int(rows.free_N[row] >> shift)
        for c in range(len(tops.gap_c)):
            left = Int(free - tops.largest_c[c])
            left = left if left >= 0 else REFUSED
            tops.gap_c[c] = left if left < tops.gap_c[c] else tops.gap_c[c]
    for c in range(len(tops.gap_c)):
        gap = tops.gap_c[c] if (tops.gap_c[c] < image) & (tops.largest_c[c] > 0) else 0
        tops.gap_c[c] = Int(min(gap * aim.y_per_cost, FARTHEST))


@compiled
def next_top(tops: Tops, room: Room, aim: Aim) -> tuple[int, int]:
    """The largest piece that keeps what is left of the pack on the pool's direction, or -1; the largest size."""
    best, largest = -NEVER, Int(-1)
    ahead = Int(room.x - room.y)
    for c in range(len(tops.tokens_c)):
        bend = Int(Int(ahead - tops.x_c[c]) + tops.y_c[c])
        bend = bend if bend > 0 else Int(-bend)
        score = Int(Int(tops.x_c[c] + tops.y_c[c]) - Int(BALANCE * bend) - Int(STRANDED * tops.gap_c[c]))
        score = score if may_fit(c, tops, room) else Int(-REFUSED)
        best = score if score > best else best
        priced = Int(Int(aim.price_x * tops.x_c[c]) + Int(aim.price_y * tops.y_c[c]))
        priced = priced if may_fit(c, tops, room) else Int(0)
        largest = priced if priced > largest else largest
    if best <= -REFUSED:
        return -1, 0
    for c in range(len(tops.tokens_c)):
        bend = abs(ahead - tops.x_c[c] + tops.y_c[c])
        score = tops.x_c[c] + tops.y_c[c] - BALANCE * bend - STRANDED * tops.gap_c[c]
        if score == best and may_fit(c, tops, room):
            return c, int(largest)
    return -1, 0


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
    return int(best)


@compiled
def top_that_leaves(target: int, tops: Tops, room: Room, aim: Aim) -> int:
    """The piece that `least_waste` found."""
    for c in range(len(tops.tokens_c)):
        left = int(aim.price_x) * max(room.x - tops.x_c[c], 0) + int(aim.price_y) * max(
            room.y - tops.y_c[c], 0
        )
        if left == target and may_fit(c, tops, room):
            return c
    return -1


# Packs.

# A pack that is this close to its aim, both budgets added, is done: the small pieces that would fill it to the
# last token are worth more in a later pack. 0.002 to 0.01 give the same fill within 0.1 %.
ENOUGH = 0.005
# First pieces that a search for a pair tries; 32 fill 0.03 to 0.16 % more and take a quarter to a third longer.
PAIR_STARTS = 16
# How the price of a budget follows its share of what is left: 1 % more of it, 10 % dearer. 30 gives the same.
PRICE_GAIN = 10.0


class Limits(NamedTuple):
    """The budget as plain integers. The pool counts 2**shift patches as one, so that a pack's fit 30 bits."""

    S: int
    N: int
    L: int
    images_per_row: int
    shift: int


class End(NamedTuple):
    """How a pack may end: its first `depth` pieces, then the tops `first` and `second` (-1: none)."""

    waste: int
    depth: int
    first: int
    second: int


@compiled
def vision_of_pack(limits: Limits) -> int:
    """N * L, in the pool's units."""
    return (limits.N * limits.L) >> limits.shift


class Work(NamedTuple):
    """Buffers of one pack: its rows, two more sets of rows to try pieces in, and the stratum of each piece."""

    rows: Rows
    trial: Rows
    second_trial: Rows
    chosen_d: npt.NDArray[np.int32]


@compiled
def fill_packs(pool: Pool, images: Images, pack_n: npt.NDArray[np.int64], limits: Limits) -> int:
    """Fill `pack_n` and `images.row_i`; return the number of packs. Every piece fits an empty pack.

    Ends because each pack takes its first piece at least.
    """
    strata = len(pool.next_c)
    zeros = np.zeros((7, strata), np.int32)
    tops = Tops(zeros[0], zeros[1], zeros[2], zeros[3], zeros[4], zeros[5], zeros[6])
    N, L = limits.N, limits.L
    chosen_d = np.empty(len(pool.piece_n) + 2, np.int32)
    work = Work(empty_rows(N, L), empty_rows(N, L), empty_rows(N, L), chosen_d)
    left = np.array([pool.tokens_n.sum(), pool.cost_n.sum()])
    at_first = left.copy()
    packs, placed = 0, 0
    while placed < len(pool.piece_n):
        aim = _aim(left, at_first, limits)
        live = _live_strata(pool)
        if live < strata or packs == 0:
            strata = live
            pool, tops = _first_strata(pool, strata), _first_tops(tops, strata)
            for c in range(strata):
                show_top(c, pool, tops, aim)
        for c in range(strata):
            measure_top(c, tops, aim)
        depth = _choose_pieces(pool, tops, images, aim, limits, work, packs)
        _reset_rows(work.rows, limits.L)
        for d in range(depth):
            at = pool.next_c[work.chosen_d[d]]
            pool.next_c[work.chosen_d[d]] += 1
            show_top(work.chosen_d[d], pool, tops, aim)
            # The same images in the same order as when the pack was chosen, hence into the same rows.
            place_images(int(pool.piece_n[at]), images, work.rows, limits.images_per_row)
            pack_n[pool.piece_n[at]] = packs
            left[0] -= pool.tokens_n[at]
            left[1] -= pool.cost_n[at]
        placed += depth
        packs += 1
    return packs


@compiled
def _reset_rows(rows: Rows, L: int) -> None:
    rows.free_N[:] = L
    rows.count_N[:] = 0


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
    next_c, end_c = pool.next_c[:strata], pool.end_c[:strata]
    return Pool(pool.tokens_n, pool.patches_n, pool.largest_n, pool.cost_n, pool.piece_n, next_c, end_c)


@compiled
def _first_tops(tops: Tops, strata: int) -> Tops:
    return Tops(
        tops.tokens_c[:strata],
        tops.patches_c[:strata],
        tops.largest_c[:strata],
        tops.cost_c[:strata],
        tops.x_c[:strata],
        tops.y_c[:strata],
        tops.gap_c[:strata],
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
def _largest_top(tops: Tops, limits: Limits) -> int:
    """The piece with the largest share of a budget."""
    largest, best = -1.0, 0
    per_token, per_cost = 1 / limits.S, 1 / vision_of_pack(limits)
    for c in range(len(tops.tokens_c)):
        share = max(tops.tokens_c[c] * per_token, tops.cost_c[c] * per_cost)
        if share > largest:
            largest, best = share, c
    return best


@compiled
def _choose_pieces(
    pool: Pool, tops: Tops, images: Images, aim: Aim, limits: Limits, work: Work, turn: int
) -> int:
    """Strata of the next pack's pieces, in order, into `work.chosen_d`; their number. The pool is as before."""
    rows = work.rows
    _reset_rows(rows, limits.L)
    x, y = UNIT if aim.x_per_token > 0 else 0, UNIT if aim.y_per_cost > 0 else 0
    room = room_of(limits.S, vision_of_pack(limits), limits.L >> limits.shift, x, y)
    best = End(1 << 60, 0, -1, -1)
    usual_image = median_image(tops)
    depth, failed, top = 0, 0, _largest_top(tops, limits)
    while top >= 0:
        if place_images(top_piece(top, pool), images, rows, limits.images_per_row):
            tokens = room.tokens - tops.tokens_c[top]
            x, y = room.x - tops.x_c[top], room.y - tops.y_c[top]
            room = room_of(tokens, rows.free_N.sum() >> limits.shift, rows.free_N.max() >> limits.shift, x, y)
            work.chosen_d[depth] = top
            depth += 1
            pool.next_c[top] += 1
            show_top(top, pool, tops, aim)
        else:
            tops.tokens_c[top] = NEVER  # not in this pack: its images do not fit the rows
            failed += 1
        if waste(room, aim) < best.waste:
            best = End(waste(room, aim), depth, -1, -1)
        if limits.N > 1:
            measure_gaps(rows, limits.shift, usual_image, tops, aim)
        top, largest = next_top(tops, room, aim)
        if top >= 0 and best.waste >= aim.enough and waste(room, aim) <= 2 * largest + max(aim.enough, 0):
            best = _best_pair(pool, tops, images, aim, limits, work, room, best, depth, largest, turn)
        if best.waste < aim.enough:
            break
    for d in range(depth):
        pool.next_c[work.chosen_d[d]] -= 1
    _show_again(depth, failed, pool, tops, aim, work)
    depth = best.depth
    for top in (best.first, best.second):
        if top >= 0:
            work.chosen_d[depth] = top
            depth += 1
    return depth


@compiled
def _show_again(depth: int, failed: int, pool: Pool, tops: Tops, aim: Aim, work: Work) -> None:
    """The tops as they were before the pack was chosen."""
    if failed:
        for c in range(len(tops.tokens_c)):
            show_top(c, pool, tops, aim)
    else:
        for d in range(depth):
            show_top(work.chosen_d[d], pool, tops, aim)


@compiled
def _best_pair(
    pool: Pool,
    tops: Tops,
    images: Images,
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
    per_row = limits.images_per_row
    for first in range((7 * turn + 3 * depth) % step, len(tops.tokens_c), step):
        if (
            not may_fit(first, tops, room)
            or waste(room, aim) - size(first, tops, aim) - largest >= best.waste
        ):
            continue
        fits, patches, widest = room_after(top_piece(first, pool), images, work.rows, work.trial, per_row)
        if not fits:
            continue
        after = room_of(
            room.tokens - tops.tokens_c[first],
            patches >> limits.shift,
            widest >> limits.shift,
            room.x - tops.x_c[first],
            room.y - tops.y_c[first],
        )
        if waste(after, aim) < best.waste:
            best = End(waste(after, aim), depth, first, -1)
        hidden = tops.tokens_c[first]
        tops.tokens_c[first] = NEVER
        least = 0 + least_waste(tops, after, aim)  # 64 bits, as the other ends have
        if least < best.waste:
            second = top_that_leaves(least, tops, after, aim)
            copy_rows(work.rows, work.second_trial)
            place_images(top_piece(first, pool), images, work.second_trial, per_row)
            if place_images(top_piece(second, pool), images, work.second_trial, per_row):
                best = End(least, depth, first, second)
        tops.tokens_c[first] = hidden
        if best.waste < aim.enough:
            break
    return best
