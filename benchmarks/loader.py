"""The loader's assembly of batches from mapped packs, beside a plain copy of the same bytes.

    python benchmarks/loader.py demo/dataset

Both sides write into new buffers of the same sizes; the page cache is warm. The two run in turn, round by
round. One thread.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from shared.dataset import DataSet, open_dataset
from trainer.data.batch import assemble_batch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--packs_per_microbatch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    dataset = open_dataset(options.dataset)
    for shard in dataset.shards:
        dataset.reader(shard)
    open_s = time.perf_counter() - begin
    groups = grouped(dataset.num_packs("train"), options.packs_per_microbatch)
    loads, copies = [], []
    for _ in range(options.rounds):
        loads.append(timed(lambda: load(dataset, groups, options.packs_per_microbatch)))
        copies.append(timed(lambda: copy(dataset, groups, options.packs_per_microbatch)))
    num_bytes = batch_bytes(dataset) * options.packs_per_microbatch * len(groups)
    images = sum(len(dataset.pack("train", i).images) for group in groups for i in group)
    load_s, ratio = float(np.median(loads)), float(np.median(np.array(copies) / np.array(loads)))
    figures = {
        "packs": len(groups) * options.packs_per_microbatch,
        "images_per_s": images / load_s,
        "gb_per_s": num_bytes / load_s / 1e9,
        "share_of_memcpy": ratio,
        "open_ms_per_shard": 1000 * open_s / len(dataset.shards),
    }
    print(
        f"{figures['packs']} packs: {figures['images_per_s']:,.0f} images/s, {figures['gb_per_s']:.2f} GB/s, "
        f"{ratio:.0%} of the speed of a plain copy; opening takes {figures['open_ms_per_shard']:.2f} ms per shard"
    )
    if options.json:
        print(json.dumps(figures))


def grouped(num_packs: int, size: int) -> list[list[int]]:
    order = np.random.default_rng(0).permutation(num_packs)[: num_packs // size * size]
    return order.reshape(-1, size).tolist()


def batch_bytes(dataset: DataSet) -> int:
    """Bytes that one pack takes in a batch: pixels with their padding, and the three token arrays."""
    budget = dataset.budget
    return budget.N * budget.L * dataset.geometry.values_per_patch + 12 * budget.S


def load(dataset: DataSet, groups: list[list[int]], size: int) -> None:
    for group in groups:
        assemble_batch(
            [dataset.pack("train", index) for index in group],
            packs_per_microbatch=size,
            budget=dataset.budget,
            values_per_patch=dataset.geometry.values_per_patch,
            merge=dataset.geometry.merge,
            pad_token=dataset.tokens.pad,
        )


def copy(dataset: DataSet, groups: list[list[int]], size: int) -> None:
    """As many bytes as a batch has, from one warm array into new memory."""
    source = np.zeros(batch_bytes(dataset) * size, np.uint8)
    for _ in groups:
        torch.empty(source.size, dtype=torch.uint8).numpy()[...] = source


def timed(function: Callable[[], None]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
