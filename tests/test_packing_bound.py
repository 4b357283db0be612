"""The bound of benchmarks/packing_bound.py against all ways to pack a few pieces, tried one by one."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
Pieces = list[tuple[int, int]]  # tokens, patches
TOKENS, PATCHES = 10, 12


@pytest.fixture(scope="module")
def bound() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("packing_bound")


def least_packs(bound: ModuleType, pieces: Pieces, number: int) -> float:
    tokens_n, patches_n = np.array(pieces).T
    return bound.least_packs(bound.round_down(tokens_n, patches_n, TOKENS, PATCHES, number), TOKENS, PATCHES)


def fewest_packs(pieces: Pieces, packs: tuple[tuple[int, int], ...] = ()) -> int:
    """Every piece into every pack that takes it, or into a new one."""
    if not pieces:
        return len(packs)
    (tokens, patches), others = pieces[0], pieces[1:]
    best = fewest_packs(others, (*packs, (tokens, patches)))
    for k, (t, p) in enumerate(packs):
        if t + tokens <= TOKENS and p + patches <= PATCHES:
            best = min(best, fewest_packs(others, (*packs[:k], (t + tokens, p + patches), *packs[k + 1 :])))
    return best


@settings(max_examples=60, deadline=None)
@given(
    pieces=st.lists(st.tuples(st.integers(1, TOKENS), st.integers(0, PATCHES)), min_size=1, max_size=7),
    number=st.integers(1, 7),
)
def test_no_packing_beats_the_bound(bound: ModuleType, pieces: Pieces, number: int) -> None:
    assert least_packs(bound, pieces, number) <= fewest_packs(pieces) + 1e-6


@pytest.mark.parametrize(
    ("pieces", "packs"),
    [
        # One of 7 patches to a pack, where the sums alone would take 6 * 7 / 12.
        ([(1, 7)] * 6, 6),
        # Two of 5 patches to a pack: their tokens and patches would allow 2.4.
        ([(4, 5)] * 6, 3),
        # 6 + 4 tokens and 4 + 8 patches fill a pack to the last.
        ([(6, 4), (4, 8)] * 3, 3),
        # Any two share a pack, no three: each of the three pairs half a pack's worth of times.
        ([(5, 1), (1, 6), (5, 6)], 1.5),
    ],
)
def test_the_bound_is_the_number_counted_by_hand(bound: ModuleType, pieces: Pieces, packs: float) -> None:
    assert least_packs(bound, pieces, 7) == pytest.approx(packs, rel=2e-3)


def test_pieces_are_never_rounded_up_and_all_are_counted(bound: ModuleType) -> None:
    rng = np.random.default_rng(0)
    tokens_n, patches_n = rng.integers(1, 100, 500), rng.integers(0, 100, 500)
    few = bound.round_down(tokens_n, patches_n, 100, 100, 20)
    assert len(few.count_c) == 20 and few.count_c.sum() == 500
    assert (
        few.tokens_c.dot(few.count_c) <= tokens_n.sum() and few.patches_c.dot(few.count_c) <= patches_n.sum()
    )
    every = bound.round_down(tokens_n, patches_n, 100, 100, 10_000)
    assert every.tokens_c.dot(every.count_c) == tokens_n.sum()
    assert every.patches_c.dot(every.count_c) == patches_n.sum()
