"""Order of data and dealing: pure functions, so every claim is checked on whole epochs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.order import Cycle, cost_imbalance, deal_packs, epoch_order, packs_of_turns


def packs_of_step(num_packs: int, packs_per_step: int, seed: int, step: int) -> np.ndarray:
    return packs_of_turns(num_packs, seed, np.arange(step * packs_per_step, (step + 1) * packs_per_step))


@pytest.mark.parametrize(("num_packs", "packs_per_step"), [(12, 4), (10, 4), (3, 8), (1, 1)])
def test_every_epoch_holds_every_pack_once(num_packs: int, packs_per_step: int) -> None:
    steps = 3 * num_packs  # packs_per_step whole epochs at least
    order = np.concatenate([packs_of_step(num_packs, packs_per_step, 0, step) for step in range(steps)])
    for epoch in range(3):
        here = order[epoch * num_packs : (epoch + 1) * num_packs]
        assert sorted(here.tolist()) == list(range(num_packs))


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    orders = [epoch_order(50, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_does_not_depend_on_what_was_asked_before() -> None:
    late = packs_of_step(10, 4, 7, 123)
    for step in range(5):
        packs_of_step(10, 4, 7, step)
    assert packs_of_step(10, 4, 7, 123).tolist() == late.tolist()


def test_a_cycle_spreads_the_turns_of_each_data_set_evenly() -> None:
    cycle = Cycle([3, 1])
    # The three turns belong at 1/6, 3/6 and 5/6, the one at 1/2, where the first in the list goes first.
    owners, turns = cycle.turns(np.arange(8))
    assert owners.tolist() == [0, 0, 1, 0] * 2
    assert turns.tolist() == [0, 1, 0, 2, 3, 4, 1, 5]
    assert [cycle.count(length).tolist() for length in (0, 3, 4, 10)] == [[0, 0], [2, 1], [3, 1], [8, 2]]
    assert cycle.positions(1, 3).tolist() == [2, 6, 10]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 10**9))
def test_a_cycle_gives_every_data_set_its_share_and_every_turn_once(quotas: list[int], cycles: int) -> None:
    cycle, size = Cycle(quotas), sum(quotas)
    owners, turns = cycle.turns(cycles * size + np.arange(2 * size))
    for owner, quota in enumerate(quotas):
        assert turns[owners == owner].tolist() == list(range(cycles * quota, (cycles + 2) * quota))
        shares = np.cumsum(owners == owner) - np.arange(1, 2 * size + 1) * quota / size
        assert np.abs(shares).max() <= len(quotas) / 2, "no part of the sequence is far from the shares"


@given(
    costs=st.lists(st.integers(1, 10**15), min_size=24, max_size=24),
    layout=st.sampled_from([(1, 24, 1), (2, 3, 4), (4, 2, 3), (24, 1, 1), (3, 1, 8)]),
)
def test_every_pack_is_dealt_once_and_microbatches_are_full(
    costs: list[int], layout: tuple[int, int, int]
) -> None:
    dp_size, accumulation, packs_per_microbatch = layout
    dealt = deal_packs(
        np.array(costs), dp_size=dp_size, accumulation=accumulation, packs_per_microbatch=packs_per_microbatch
    )
    assert dealt.shape == layout
    assert sorted(dealt.reshape(-1).tolist()) == list(range(24))


def test_dealing_evens_out_the_cost_of_ranks() -> None:
    # By hand: 9 | 8 | 7 | 6 go to four ranks, then 5 joins 6, 4 joins 7, 3 joins 8, 2 joins 9: 11 each.
    dealt = deal_packs(np.array([2, 3, 4, 5, 6, 7, 8, 9]), dp_size=4, accumulation=1, packs_per_microbatch=2)
    costs = np.array([2, 3, 4, 5, 6, 7, 8, 9])[dealt]
    assert costs.sum(axis=(1, 2)).tolist() == [11, 11, 11, 11]


def test_ranks_that_wait_for_each_other_get_like_loads() -> None:
    # One pack per microbatch: the two ranks of a microbatch get neighbours in cost.
    costs = np.array([100, 1, 99, 2])
    dealt = deal_packs(costs, dp_size=2, accumulation=2, packs_per_microbatch=1)
    assert [sorted(costs[dealt[:, step, 0]].tolist()) for step in range(2)] == [[99, 100], [1, 2]]


def test_each_round_of_microbatches_evens_out_the_sums_of_the_rounds_before() -> None:
    # Rounds (8, 7) and (2, 1): the rank that got 8 gets 1.
    dealt = deal_packs(np.array([2, 8, 1, 7]), dp_size=2, accumulation=2, packs_per_microbatch=1)
    assert dealt.tolist() == [[[1], [2]], [[3], [0]]]
    # Sums 8 + 1 and 7 + 2, the largest of each round 8 and 2; then 8 + 2 beside 7 + 1; then 8 + 1 beside 2 + 7.
    costs = np.array([2, 8, 1, 7])
    assert cost_imbalance(costs, dealt) == (1.0, 10 / 9)
    assert cost_imbalance(costs, np.array([[[1], [0]], [[3], [2]]])) == (10 / 9, 10 / 9)
    assert cost_imbalance(costs, np.array([[[1], [2]], [[0], [3]]])) == (1.0, 15 / 9)
