"""Which packs a step trains on, and which rank gets which: pure functions of (seed, step), no state.

    positions of step t:  t * G .. t * G + G - 1  of an endless sequence
    one data set:         epoch 0 | epoch 1 | ..    each epoch is its own permutation of all packs
    several:              a a b a | a a b a | ..    a cycle says whose turn it is; each has its own epochs

A global batch is therefore the same set of packs on any number of ranks, no pack is dropped at the end of an
epoch, and going on from step t costs nothing but one permutation.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@lru_cache(maxsize=32)  # two epochs, for the step that spans both, of sixteen data sets
def epoch_order(num_packs: int, seed: int, epoch: int, stream: int = 0) -> npt.NDArray[np.int32]:
    """Permutation of all packs of a data set, int32 [num_packs]. `stream` tells the data sets of a mixture apart."""
    return np.random.default_rng([seed, epoch, stream]).permutation(num_packs).astype(np.int32)


def packs_of_turns(num_packs: int, seed: int, turn_n: IntArray, stream: int = 0) -> IntArray:
    """The packs that a data set gives when it is asked for the `turn`-th time, int64 [n]."""
    epoch_n, place_n = np.divmod(turn_n, num_packs)
    pack_n = np.empty(len(turn_n), np.int64)
    for epoch in np.unique(epoch_n).tolist():
        here = epoch_n == epoch
        pack_n[here] = epoch_order(num_packs, seed, epoch, stream)[place_n[here]]
    return pack_n


class Cycle:
    """Whose turn it is at each position of the endless sequence: a pattern of M = sum(quotas) positions, repeated.

    The j-th of q turns of a data set belongs at (j + 1/2) / q of the pattern; all turns are sorted by that, so that
    every part of the sequence holds the data sets in nearly their shares.
    """

    def __init__(self, quotas: Sequence[int]) -> None:
        self.quota_m = np.array(quotas, np.int64)
        owner_M = np.repeat(np.arange(len(quotas)), self.quota_m)
        turn_M = np.concatenate([np.arange(quota) for quota in quotas])
        order = np.lexsort((owner_M, (2 * turn_M + 1) / self.quota_m[owner_M]))
        self.owner_M, self.turn_M = owner_M[order], turn_M[order]

    def turns(self, position_n: IntArray) -> tuple[IntArray, IntArray]:
        """Of each position: the data set whose turn it is, and which of its turns."""
        cycle_n, place_n = np.divmod(position_n, len(self.owner_M))
        owner_n = self.owner_M[place_n]
        return owner_n, cycle_n * self.quota_m[owner_n] + self.turn_M[place_n]

    def count(self, length: int) -> IntArray:
        """Turns of each data set among the first `length` positions, int64 [data sets]."""
        cycles, rest = divmod(length, len(self.owner_M))
        return cycles * self.quota_m + np.bincount(self.owner_M[:rest], minlength=len(self.quota_m))

    def positions(self, owner: int, count: int) -> IntArray:
        """Where the first `count` turns of a data set are, int64 [count]."""
        places = np.flatnonzero(self.owner_M == owner)
        cycle_n, turn_n = np.divmod(np.arange(count), len(places))
        return cycle_n * len(self.owner_M) + places[turn_n]


class Imbalance(NamedTuple):
    """Modelled cost of the costliest rank to the mean over ranks: where they meet once a step, or at every microbatch.

    FSDP gathers weights in every microbatch, so that `microbatch` is the time that is lost with it.
    """

    step: float
    microbatch: float


def cost_imbalance(costs: IntArray, dealt: IntArray) -> Imbalance:
    """Of one step; `dealt` as `deal_packs` returns it."""
    cost_ra = costs[dealt].sum(axis=2)  # rank, accumulated microbatch
    mean = cost_ra.sum() / len(cost_ra)
    return Imbalance(float(cost_ra.sum(axis=1).max() / mean), float(cost_ra.max(axis=0).sum() / mean))


def deal_packs(costs: IntArray, *, dp_size: int, accumulation: int, packs_per_microbatch: int) -> IntArray:
    """Deal a global batch so that no rank waits: int64 [dp_size, accumulation, packs_per_microbatch].

    Entries index `costs`. Longest processing time first (Graham 1969) over microbatches of fixed size: the
    costliest pack left goes to the microbatch with the least cost that has a place.

    Microbatches of about one cost run at the same time, as all ranks wait for the slowest in each; and each round of
    them is dealt against the sums of the rounds before, as those who synchronize once per step wait for the slowest
    sum.
    """
    heap = [(0, number) for number in range(dp_size * accumulation)]
    dealt: list[list[int]] = [[] for _ in heap]
    for pack in np.argsort(-costs, kind="stable").tolist():
        load, number = heapq.heappop(heap)
        dealt[number].append(pack)
        if len(dealt[number]) < packs_per_microbatch:
            heapq.heappush(heap, (load + int(costs[pack]), number))
    packs = np.array(dealt, np.int64)
    cost = costs[packs].sum(axis=1)
    # Neighbours in cost are different ranks of one round.
    rounds = np.argsort(-cost, kind="stable").reshape(accumulation, dp_size)
    sums_r = np.zeros(dp_size, np.int64)
    table = np.empty((dp_size, accumulation, packs_per_microbatch), np.int64)
    for number, own in enumerate(rounds):
        # The costliest of a round goes to the rank of the least sum.
        ranks = np.argsort(sums_r, kind="stable")
        table[ranks, number] = packs[own]
        sums_r[ranks] += cost[own]
    return table
