"""Which packs a step trains on, and which rank gets which: pure functions of (seed, step), no state.

    positions of step t:  t * G .. t * G + G - 1  of the endless sequence  epoch 0 | epoch 1 | ..
    each epoch is its own permutation of all packs

A global batch is therefore the same set of packs on any number of ranks, no pack is dropped at the end of an
epoch, and going on from step t costs nothing but one permutation.
"""

from __future__ import annotations

import heapq
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


@lru_cache(maxsize=2)
def epoch_order(num_packs: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Permutation of all packs, int64 [num_packs]. Two epochs are kept, for the step that spans both."""
    return np.random.default_rng([seed, epoch]).permutation(num_packs)


def packs_of_step(num_packs: int, packs_per_step: int, seed: int, step: int) -> npt.NDArray[np.int64]:
    """Packs of the global batch of `step`, int64 [packs_per_step]."""
    position = np.arange(step * packs_per_step, (step + 1) * packs_per_step)
    epoch, place = np.divmod(position, num_packs)
    packs = np.empty(packs_per_step, np.int64)
    for number in np.unique(epoch).tolist():
        here = epoch == number
        packs[here] = epoch_order(num_packs, seed, number)[place[here]]
    return packs


class Imbalance(NamedTuple):
    """Modelled cost of the costliest rank to the mean over ranks: where they meet once a step, or at every microbatch.

    FSDP gathers weights in every microbatch, so that `microbatch` is the time that is lost with it.
    """

    step: float
    microbatch: float


def cost_imbalance(costs: npt.NDArray[np.int64], dealt: npt.NDArray[np.int64]) -> Imbalance:
    """Of one step; `dealt` as `deal_packs` returns it."""
    cost_ra = costs[dealt].sum(axis=2)  # rank, accumulated microbatch
    mean = cost_ra.sum() / len(cost_ra)
    return Imbalance(float(cost_ra.sum(axis=1).max() / mean), float(cost_ra.max(axis=0).sum() / mean))


def deal_packs(
    costs: npt.NDArray[np.int64], *, dp_size: int, accumulation: int, packs_per_microbatch: int
) -> npt.NDArray[np.int64]:
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
