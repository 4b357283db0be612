"""How evenly the packs of a step fall on ranks: the most costly rank beside the mean, dealt by cost or as they come.

    python benchmarks/balance.py --lengths LENGTHS.py

Packs of a million samples (`benchmarks/packing.py`), their modelled cost as the shards hold it, the trainer's own order
and dealing. Every microbatch waits for its slowest rank, so that the sum over a step's microbatches of their largest
cost, to the mean cost of a rank, is the time lost; beside it the largest sum of one rank, which is what counts where
ranks meet once a step.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from geometry import load_module
from packing import Pieces, make_pieces

from preprocess.config import CostConfig
from preprocess.cost import attention_cost, linear_cost
from preprocess.packing import pack_pieces
from shared.geometry import Budget
from trainer.data.order import cost_imbalance, deal_packs, packs_of_turns

SETTINGS = [(2, 1024, Budget(S=8192, N=1, L=18304)), (1, 256, Budget(S=4096, N=1, L=2500))]
RANKS, PACKS_PER_RANK = 64, 2
WINDOW = 65_536


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=Path, required=True, help="module with the length tables")
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    tables = load_module(options.lengths)
    print(f"max/mean over {RANKS} ranks of {PACKS_PER_RANK} packs each, {options.steps} steps: mean (95 %)")
    print("                     pack costs: spread  most     dealt   per step        per microbatch")
    rows: list[dict[str, Any]] = []
    for merge, cap, budget in SETTINGS:
        costs = pack_costs(make_pieces(tables, options.samples, merge, cap, budget), budget)
        for name, dealt in (("as they come", False), ("by cost", True)):
            per_step, per_microbatch = ratios(costs, options.steps, dealt)
            row = {
                "merge": merge, "cap": cap, "S": budget.S, "dealt": name,
                "spread": float(costs.std() / costs.mean()), "most": float(costs.max() / costs.mean()),
                "step": summary(per_step), "microbatch": summary(per_microbatch),
            }  # fmt: skip
            rows.append(row)
            print(
                f"m={merge}, cap {cap:4}, S={budget.S}          {row['spread']:.3f} {row['most']:5.3f}  "
                f"{name:>12}   {row['step'][0]:.4f} ({row['step'][1]:.4f})   {row['microbatch'][0]:.4f} "
                f"({row['microbatch'][1]:.4f})"
            )
    if options.json:
        print(json.dumps(rows))


def pack_costs(pieces: Pieces, budget: Budget) -> npt.NDArray[np.int64]:
    """Modelled FLOPs of every pack, window by window."""
    found: list[npt.NDArray[np.int64]] = []
    for begin in range(0, len(pieces.tokens_n), WINDOW):
        own = pieces.window(begin, min(begin + WINDOW, len(pieces.tokens_n)))
        packing = pack_pieces(own.tokens_n, own.offset_n, own.patches_i, budget)
        pack_i = np.repeat(packing.pack_n, np.diff(own.offset_n))
        sums = [
            np.bincount(number, values, packing.num_packs).astype(np.int64)
            for number, values in (
                (packing.pack_n, own.tokens_n),
                (pack_i, own.patches_i),
                (packing.pack_n, own.tokens_n**2),
                (pack_i, own.patches_i**2),
            )
        ]
        config = CostConfig()
        columns = np.stack(sums, axis=1).tolist()
        found.append(
            np.array([linear_cost(t, p, config) + attention_cost(tt, pp, config) for t, p, tt, pp in columns])
        )
    return np.concatenate(found)


def ratios(
    costs: npt.NDArray[np.int64], steps: int, dealt: bool
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Per step: the largest sum of a rank, and the sum of the largest of each microbatch, to the mean of a rank."""
    per_step, per_microbatch = np.empty(steps), np.empty(steps)
    for step in range(steps):
        own = costs[
            packs_of_turns(len(costs), 0, np.arange(RANKS * PACKS_PER_RANK) + step * RANKS * PACKS_PER_RANK)
        ]
        table = np.arange(len(own)).reshape(RANKS, PACKS_PER_RANK, 1)
        if dealt:
            table = deal_packs(own, dp_size=RANKS, accumulation=PACKS_PER_RANK, packs_per_microbatch=1)
        per_step[step], per_microbatch[step] = cost_imbalance(own, table)
    return per_step, per_microbatch


def summary(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    return float(values.mean()), float(np.percentile(values, 95))


if __name__ == "__main__":
    main()
