"""How fast a finished data set is proven, beside reading and hashing its bytes once; processor time, one thread.

    python benchmarks/verify.py DATASET

The pages are warm: what is measured is the proof, not the disk.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

from preprocess.verify import verify_dataset
from shared.files import file_checksum


def seconds(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    shards = sorted((options.dataset / "shards").glob("*.parquet"))
    counts, faults = verify_dataset(options.dataset)
    if faults:
        raise SystemExit(f"{options.dataset}: {len(faults)} faults, the first: {faults[0]}")
    proof = min(seconds(lambda: verify_dataset(options.dataset)) for _ in range(options.rounds))
    hashing = min(seconds(lambda: [file_checksum(shard) for shard in shards]) for _ in range(options.rounds))
    figures = {
        "gigabytes": counts["bytes"] / 1e9,
        "packs": counts["packs"],
        "verify_gb_per_s": counts["bytes"] / proof / 1e9,
        "hash_gb_per_s": counts["bytes"] / hashing / 1e9,
    }
    print(
        f"{figures['gigabytes']:.2f} GB in {counts['shards']} shards, {counts['packs']:,} packs, "
        f"{counts['images']:,} images: verify {figures['verify_gb_per_s']:.2f} GB/s, reading and hashing alone "
        f"{figures['hash_gb_per_s']:.2f} GB/s"
    )
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
