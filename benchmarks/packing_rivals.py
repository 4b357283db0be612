"""How others assign pieces to packs, rebuilt from descriptions, for benchmarks/packing.py to compare with.

All but `best_fit_decreasing_on_both` look at tokens alone. Each returns the pack of every piece.
"""

from __future__ import annotations

import heapq
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def next_fit_decreasing(tokens_n: Ints, S: int, buffer: int = 100) -> Ints:
    """torchtitan's VLM experiment: buffers of 100, the longest first, one open pack, closed by what does not fit."""
    pack_n = np.empty(len(tokens_n), np.int64)
    pack = -1
    for begin in range(0, len(tokens_n), buffer):
        here = begin + np.argsort(-tokens_n[begin : begin + buffer], kind="stable")
        free = 0  # the last pack of a buffer is closed with it
        for piece, tokens in zip(here.tolist(), tokens_n[here].tolist(), strict=True):
            if tokens > free:
                pack, free = pack + 1, S
            pack_n[piece] = pack
            free -= tokens
    return pack_n


def first_fit_in_eight(tokens_n: Ints, S: int, bins: int = 8) -> Ints:
    """grain's FirstFitPackIterDataset: eight open packs; what fits none of them closes them all."""
    pack_n = np.empty(len(tokens_n), np.int64)
    first, free = 0, [S] * bins
    for piece, tokens in enumerate(tokens_n.tolist()):
        at = next((number for number in range(bins) if free[number] >= tokens), -1)
        if at < 0:
            at, first, free = 0, first + bins, [S] * bins
        free[at] -= tokens
        pack_n[piece] = first + at
    return np.unique(pack_n, return_inverse=True)[1]


def worst_fit_balanced(tokens_n: Ints, S: int) -> Ints:
    """Eagle and nanoVLM: ceil(sum / S) + 20 packs, the longest first into the emptiest; one more if it is full."""
    packs = -(-int(tokens_n.sum()) // S) + 20
    heap = [(0, number) for number in range(packs)]
    pack_n = np.empty(len(tokens_n), np.int64)
    order = np.argsort(-tokens_n, kind="stable")
    for piece, tokens in zip(order.tolist(), tokens_n[order].tolist(), strict=True):
        used, number = heap[0]
        if used + tokens > S:
            heapq.heappush(heap, (tokens, packs))
            pack_n[piece], packs = packs, packs + 1
        else:
            heapq.heapreplace(heap, (used + tokens, number))
            pack_n[piece] = number
    return np.unique(pack_n, return_inverse=True)[1]


@numba.njit(cache=True)
def _best_fit(tokens_n: Ints, order: Ints, S: int, pack_n: Ints) -> int:
    """Packs with r tokens free form a chain that starts at head_r[r]."""
    head_r, next_k, packs = np.full(S + 1, -1), np.empty(len(order), np.int64), 0
    for piece in order:
        free = tokens_n[piece]
        while free <= S and head_r[free] < 0:
            free += 1
        if free > S:
            pack, free, packs = packs, S, packs + 1
        else:
            pack = head_r[free]
            head_r[free] = next_k[pack]
        pack_n[piece] = pack
        left = free - tokens_n[piece]
        next_k[pack], head_r[left] = head_r[left], pack
    return packs


def best_fit_decreasing(tokens_n: Ints, S: int) -> Ints:
    """The longest first, into the fullest pack that takes it."""
    pack_n = np.empty(len(tokens_n), np.int64)
    _best_fit(tokens_n, np.argsort(-tokens_n, kind="stable"), S, pack_n)
    return pack_n


@numba.njit(cache=True)
def _best_fit_on_both(x_n: Any, y_n: Any, order: Ints, pack_n: Ints) -> int:
    free_x, free_y, packs = np.empty(len(order)), np.empty(len(order)), 0
    for piece in order:
        best, least = -1, 3.0
        for pack in range(packs):
            if free_x[pack] >= x_n[piece] and free_y[pack] >= y_n[piece]:
                left = free_x[pack] + free_y[pack]
                if left < least:
                    best, least = pack, left
        if best < 0:
            best, packs = packs, packs + 1
            free_x[best] = free_y[best] = 1.0 + 1e-9
        free_x[best] -= x_n[piece]
        free_y[best] -= y_n[piece]
        pack_n[piece] = best
    return packs


def best_fit_decreasing_on_both(tokens_n: Ints, vision_n: Ints, S: int, patches: int) -> Ints:
    """The largest share of a budget first, into the pack where least of both is left; vision as one row."""
    x_n, y_n = tokens_n / S, vision_n / patches
    pack_n = np.empty(len(tokens_n), np.int64)
    _best_fit_on_both(x_n, y_n, np.argsort(-np.maximum(x_n, y_n), kind="stable"), pack_n)
    return pack_n
