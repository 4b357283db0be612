"""Distributions of integers that stream by: exact counts of every value, however many there are of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
            self.merge()

    def join(self, other: Distribution) -> None:
        """Take in what another one counted."""
        other.merge()
        self.merge(other._values, other._counts)

    def summary(
        self,
        percentiles: Sequence[int],
        decode: Callable[[Ints], npt.NDArray[Any]] = lambda values: values,
    ) -> dict[str, float]:
        """count, mean, p5 .. as `numpy.percentile` has them; `decode` makes of the integers what they stand for."""
        self.merge()
        total = int(self._counts.sum())
        if not total:
            return {"count": 0}
        values, ends = decode(self._values).astype(np.float64), np.cumsum(self._counts)
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

    def merge(self, values: Ints | None = None, counts: Ints | None = None) -> None:
        """Count what waits, and `counts` of each of `values`."""
        parts = [(self._values, self._counts)]
        parts += [(waiting, np.ones(len(waiting), np.int64)) for waiting in self._waiting]
        if values is not None and counts is not None:
            parts.append((values, counts))
        self._values, inverse = np.unique(np.concatenate([part for part, _ in parts]), return_inverse=True)
        weights = np.concatenate([part for _, part in parts])
        self._counts = np.bincount(inverse, weights, len(self._values)).astype(np.int64)
        self._waiting, self._num_waiting = [], 0
