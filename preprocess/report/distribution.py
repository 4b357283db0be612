"""Distributions of integers that stream by: exact counts of every value, however many there are of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


# Values that wait until they are counted: 8 MB of them.
MERGE_AT = 1 << 20


class Distribution:
    """How often each integer came. Memory: 16 bytes per different value, whatever the number of values."""

    def __init__(self) -> None:
        self._values, self._counts = np.empty(0, np.int64), np.empty(0, np.int64)
        self._waiting: list[Ints] = []
        self._num_waiting = 0

    def add(self, values: Ints) -> None:
        self._waiting.append(values)
        self._num_waiting += len(values)
        if self._num_waiting >= MERGE_AT:
            self._merge()

    @property
    def num_held(self) -> int:
        """Numbers in memory."""
        return len(self._values) + self._num_waiting

    def summary(
        self,
        percentiles: Sequence[int],
        decode: Callable[[Ints], npt.NDArray[np.float64]] = lambda values: values.astype(np.float64),
    ) -> dict[str, float]:
        """count, mean, p5 .. as `numpy.percentile` has them; `decode` makes of the integers what they stand for."""
        self._merge()
        total = int(self._counts.sum())
        if not total:
            return {"count": 0}
        values, ends = decode(self._values), np.cumsum(self._counts)
        # Between two neighbours of the sorted values, in proportion.
        place = np.array(percentiles) / 100 * (total - 1)
        low = np.floor(place).astype(np.int64)
        below = values[np.searchsorted(ends, low, side="right")]
        above = values[np.searchsorted(ends, np.minimum(low + 1, total - 1), side="right")]
        points = below + (above - below) * (place - low)
        named = {
            f"p{percent}": round(float(point), 3) for percent, point in zip(percentiles, points, strict=True)
        }
        return {"count": total, "mean": round(float((values * self._counts).sum() / total), 3), **named}

    def _merge(self) -> None:
        weights = [self._counts, *(np.ones(len(values), np.int64) for values in self._waiting)]
        self._values, inverse = np.unique(np.concatenate([self._values, *self._waiting]), return_inverse=True)
        self._counts = np.bincount(inverse, np.concatenate(weights), len(self._values)).astype(np.int64)
        self._waiting, self._num_waiting = [], 0
