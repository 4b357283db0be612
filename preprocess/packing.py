"""Joint packing: pieces into packs of S tokens and N vision rows of L patches. Pure arrays, no I/O.

Best fit decreasing on both budgets: pieces from large to small (by the larger of their two shares), each into
the open pack where it leaves least room, counting both budgets; images of a piece go, largest first, into the
fullest vision row that takes them. No budget is ever broken and every piece is placed exactly once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.geometry import Budget

Ints = npt.NDArray[np.int64]


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
) -> Packing:
    """Pack pieces of `tokens_n` tokens; piece i has the images [image_offsets[i], image_offsets[i + 1]).

    `images_per_row` bounds the images of one vision row; 0 is no bound.

    Raises:
        ValueError: a piece cannot fit an empty pack; the message names it and the budget.
    """
    patches_i = np.asarray(patches_i, np.int64)
    ends = np.concatenate([[0], np.cumsum(patches_i)])
    vision_n = ends[image_offsets[1:]] - ends[image_offsets[:-1]]
    share_n = np.maximum(tokens_n / budget.S, vision_n / (budget.N * budget.L))
    packs = _OpenPacks(budget, images_per_row or len(patches_i) + 1, int(min(tokens_n, default=0)))
    pack_n = np.full(len(tokens_n), -1, np.int64)
    row_i = np.full(len(patches_i), -1, np.int64)
    for piece in np.argsort(-share_n, kind="stable"):
        images = slice(int(image_offsets[piece]), int(image_offsets[piece + 1]))
        pack_n[piece], row_i[images] = packs.place(int(piece), int(tokens_n[piece]), patches_i[images])
    return Packing(packs.count, pack_n, row_i)


class _OpenPacks:
    """What every open pack still takes. Packs too full for the smallest piece are set aside."""

    def __init__(self, budget: Budget, images_per_row: int, least_tokens: int) -> None:
        self._budget = budget
        self._images_per_row = images_per_row
        self._least_tokens = least_tokens
        self.count = 0
        self._open = 0
        self._id = np.zeros(64, np.int64)
        self._tokens = np.zeros(64, np.int64)
        self._rows = np.zeros((64, budget.N), np.int64)
        self._images = np.zeros((64, budget.N), np.int64)

    def place(self, piece: int, tokens: int, patches: Ints) -> tuple[int, Ints]:
        """Pack number and the vision row of each image."""
        for slot in self._candidates(tokens, patches):
            rows = self._fit_images(slot, patches)
            if rows is not None:
                return self._take(slot, tokens, patches, rows)
        slot = self._new_pack()
        rows = self._fit_images(slot, patches)
        if rows is None or tokens > self._budget.S:
            name = "S" if tokens > self._budget.S else "L" if patches.max() > self._budget.L else "N"
            raise ValueError(
                f"piece {piece} of {tokens} tokens and {patches.tolist()} patches exceeds budget {name}"
            )
        return self._take(slot, tokens, patches, rows)

    def _candidates(self, tokens: int, patches: Ints) -> Ints:
        """Open slots that may take the piece, the one with least room left over first."""
        free_tokens, free_rows = self._tokens[: self._open], self._rows[: self._open]
        fits = free_tokens >= tokens
        vision = int(patches.sum())
        if len(patches):
            usable = np.where(self._images[: self._open] < self._images_per_row, free_rows, 0)
            fits &= (usable.max(axis=1, initial=0) >= patches.max()) & (usable.sum(axis=1) >= vision)
        slots = np.flatnonzero(fits)
        budget = self._budget
        left = (free_tokens[slots] - tokens) / budget.S
        left += (free_rows[slots].sum(axis=1) - vision) / (budget.N * budget.L)
        if len(patches) <= 1:  # the conditions above are exact for one image
            return slots[[np.argmin(left)]] if len(slots) else slots
        return slots[np.argsort(left, kind="stable")]

    def _fit_images(self, slot: int, patches: Ints) -> Ints | None:
        """A row for each image, each into the fullest row that takes it; None if one fits none.

        Largest image first; if that fails in document order, as the sample was cut (`stream.split_sample`): what
        fitted there fits an empty pack here.
        """
        for order in (np.argsort(-patches, kind="stable"), np.arange(len(patches))):
            free, used = self._rows[slot].copy(), self._images[slot].copy()
            rows = np.full(len(patches), -1, np.int64)
            for image in order:
                fitting = np.flatnonzero((free >= patches[image]) & (used < self._images_per_row))
                if not len(fitting):
                    break
                row = fitting[np.argmin(free[fitting])]
                free[row] -= patches[image]
                used[row] += 1
                rows[image] = row
            else:
                return rows
        return None

    def _take(self, slot: int, tokens: int, patches: Ints, rows: Ints) -> tuple[int, Ints]:
        self._tokens[slot] -= tokens
        np.subtract.at(self._rows[slot], rows, patches)
        np.add.at(self._images[slot], rows, 1)
        number = int(self._id[slot])
        if self._tokens[slot] < self._least_tokens:
            last = self._open - 1
            for array in (self._id, self._tokens, self._rows, self._images):
                array[slot] = array[last]
            self._open = last
        return number, rows

    def _new_pack(self) -> int:
        if self._open == len(self._id):
            self._id, self._tokens, self._rows, self._images = (
                np.concatenate([array, np.zeros_like(array)])
                for array in (self._id, self._tokens, self._rows, self._images)
            )
        slot = self._open
        self._id[slot], self._tokens[slot] = self.count, self._budget.S
        self._rows[slot], self._images[slot] = self._budget.L, 0
        self._open += 1
        self.count += 1
        return slot
