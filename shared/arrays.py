"""Ragged arrays without loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def runs(start_n: npt.NDArray[Any], length_n: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """start, start + 1, .. for `length` numbers of each run, one run after another: int64 [sum(length)].

    runs([10, 50], [3, 2]) == [10, 11, 12, 50, 51]
    """
    before_n = np.cumsum(length_n) - length_n
    return np.arange(int(np.sum(length_n))) + np.repeat(np.asarray(start_n, np.int64) - before_n, length_n)
