"""How full packs are by the number of pieces that are packed together.

    python benchmarks/windows.py --lengths LENGTHS.py

The same pieces as in `benchmarks/packing.py`, cut into windows of each size; the last line packs them all at once.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from geometry import load_module
from packing import Ints, Pieces, make_pieces, measure

from preprocess.packing import pack_pieces
from shared.geometry import Budget

SETTINGS = [(2, 1024, Budget(S=8192, N=1, L=18304)), (1, 256, Budget(S=4096, N=1, L=2500))]
SMALLEST = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=Path, required=True, help="module with the length tables")
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    tables = load_module(options.lengths)
    rows: list[dict[str, Any]] = []
    for merge, cap, budget in SETTINGS:
        pieces = make_pieces(tables, options.samples, merge, cap, budget)
        print(f"m={merge}, cap {cap}, {budget}\n   window   tokens  patches  packs/bound")

        def packer(own: Pieces, budget: Budget = budget) -> tuple[Ints, Ints]:
            packing = pack_pieces(own.tokens_n, own.offset_n, own.patches_i, budget)
            return packing.pack_n, packing.row_i

        window = SMALLEST
        while window < 2 * len(pieces.tokens_n):
            row = {"merge": merge, "window": window, **measure(pieces, packer, budget, window)}
            print(f"{window:9,} {row['tokens']:8.2%} {row['patches']:8.2%} {row['bound']:12.4f}")
            rows.append(row)
            window *= 2
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
