"""Ragged arrays."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shared.arrays import runs


def test_runs_by_hand() -> None:
    assert runs(np.array([10, 50]), np.array([3, 2])).tolist() == [10, 11, 12, 50, 51]
    assert runs(np.array([-2]), np.array([4])).tolist() == [-2, -1, 0, 1]


def test_no_runs_are_no_numbers() -> None:
    empty = np.zeros(0, np.int32)
    assert runs(empty, empty).tolist() == []


@given(st.lists(st.tuples(st.integers(-(2**40), 2**40), st.integers(0, 9))))
def test_runs_equal_their_loop(pairs: list[tuple[int, int]]) -> None:
    starts, lengths = np.array(pairs, np.int64).reshape(-1, 2).T
    found = runs(starts, lengths)
    assert found.dtype == np.int64
    assert found.tolist() == [start + i for start, length in pairs for i in range(length)]


def test_starts_beyond_int32_do_not_wrap_whatever_the_lengths_are() -> None:
    assert runs(np.array([2**31]), np.array([2], np.int32)).tolist() == [2**31, 2**31 + 1]
