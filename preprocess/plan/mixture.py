"""Mixtures: how often each source is used, and which rows a fractional repeat takes.

A weight is a share of decoder tokens. Weights become repeats, scaled so that the least repeated of the weighted sources
is used `least_repeat` times. A repeat of 2.3 uses every sample twice and 30 % of them, chosen by a hash of
(seed, source, row), a third time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from preprocess.plan.files import Mask
from preprocess.sources.base import SourceConfig
from shared.errors import UserError
from shared.geometry import Budget

# Every copy of a sample has a window of its own. So many windows are always made; more only where each fills at least
# so many packs: below, most of every pack would be padding.
FREE_COPIES = 16
LEAST_PACKS_PER_COPY = 2


def source_repeats(
    sources: Mapping[str, SourceConfig], tokens: Mapping[str, int], least_repeat: float
) -> dict[str, float]:
    """How often each source's training samples are used; `tokens` are those of one use.

    Raises:
        UserError: a source has a weight and no token.
    """
    weighted = {name: source.weight for name, source in sources.items() if source.weight}
    for name in weighted:
        if not tokens[name]:
            raise UserError(
                f"source {name!r} has weight {weighted[name]} but nothing to train on; take it out"
            )
    ratios = {name: weight / tokens[name] for name, weight in weighted.items()}
    least = min(ratios.values(), default=1.0)
    return {
        name: least_repeat * ratios[name] / least if name in ratios else source.repeat
        for name, source in sources.items()
    }


def check_copies(
    repeats: Mapping[str, float],
    source_b: npt.NDArray[np.int32],
    tokens_b: npt.NDArray[np.int64],
    patches_b: npt.NDArray[np.int64],
    budget: Budget,
) -> None:
    """Tokens and patches of one use of every block of the training split, and the number of its source.

    Raises:
        UserError: a source is used more often than there are packs to keep its copies apart.
    """
    used_b = np.array(list(repeats.values()))[source_b]
    packs = max((tokens_b * used_b).sum() / budget.S, (patches_b * used_b).sum() / (budget.N * budget.L))
    most = max(FREE_COPIES, int(packs / LEAST_PACKS_PER_COPY))
    for number, (name, repeat) in enumerate(repeats.items()):
        if copies_of(repeat) > most and tokens_b[source_b == number].any():
            raise UserError(
                f"source {name!r} would be used {repeat:.6g} times, but all training samples fill about "
                f"{math.ceil(packs):,} packs, and copies of a sample go to different windows of "
                f"{LEAST_PACKS_PER_COPY} packs or more: at most {most} uses; lower its weight or repeat, or give it "
                "more samples"
            )


def copies_of(repeat: float) -> int:
    """Copies of a source's blocks that are dealt: the last holds the fraction."""
    return math.ceil(repeat)


def chosen_rows(repeat: float, copy: int, seed: int, place: str, row_n: npt.NDArray[np.int64]) -> Mask:
    """Which rows of an index file (`place` is its path below index/) are used in copy `copy` = 0, 1, .. ."""
    share = repeat - copy
    if share >= 1:
        return np.ones(len(row_n), bool)
    start = np.uint64(xxhash.xxh3_64_intdigest(f"{seed}/{place}".encode()))
    # SplitMix64: the row-th number of the generator that begins at `start`.
    z = start + (row_n.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)) * 2.0**-53 < share


def mixture_record(
    sources: Mapping[str, SourceConfig],
    repeats: Mapping[str, float],
    available: Mapping[str, int],
    used: Mapping[str, int],
) -> dict[str, dict[str, Any]]:
    """Per source: the mixture asked for beside the one got, in training tokens. `available` are those of one use."""
    asked = {name: repeats[name] * available[name] for name in sources}
    totals = max(1.0, sum(asked.values())), max(1, sum(used.values()))
    return {
        name: {
            "weight": source.weight,
            "repeat": round(repeats[name], 6),
            "tokens_once": available[name],
            "tokens": used[name],
            "share_asked": round(asked[name] / totals[0], 6),
            "share": round(used[name] / totals[1], 6),
        }
        for name, source in sources.items()
    }
