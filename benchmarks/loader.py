"""The loader's assembly of batches from mapped packs, beside a plain copy of the same bytes into the same buffers.

    python benchmarks/loader.py [--dataset DIR] [--json]

Without --dataset, packs of real size are made first: S 8192, 9 vision rows of 2048 patches of 768 values, images of
16 to 1024 patches, as the configs for GPUs have them.

Assembly takes finished packs from the page cache to the tensors of a batch. The copy takes the same values from
ordinary memory to the same tensors, with one call per tensor. Both write into one set of buffers, in turn for every
pack; one thread; of each pack the best of all rounds. Every round maps the shards anew, as training meets each page of
a shard for the first time; `one by one` is the same without `trainer.data.pages`.

Then: opening a data set of 10,000 shards, the first step at a late position of it, and the size of the state.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from packs import write_packs

from shared.dataset import DataSet, open_dataset
from shared.geometry import Budget
from trainer.data.batch import Batch, BatchShape, empty_batch, fill_batch
from trainer.data.borders import document_ends, frame_ends
from trainer.data.loader import Loader
from trainer.data.mixture import single

BUDGET = Budget(S=8192, N=9, L=2048)
TINY = Budget(S=64, N=1, L=16)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", type=Path)
    parser.add_argument(
        "--packs", type=int, default=48, help="packs to make, or to take of --dataset at most"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        path = options.dataset or write_packs(Path(directory) / "real", BUDGET, options.packs)
        figures = against_memcpy(path, options.packs, options.rounds)
        figures |= many_shards(Path(directory) / "many", options.shards)
    print(
        f"{figures['packs']} packs of {figures['mb_per_pack']:.1f} MB: {figures['gb_per_s']:.2f} GB/s, "
        f"{figures['images_per_s']:,.0f} images/s, {figures['share_of_memcpy']:.0%} of a plain copy of the same bytes "
        f"({figures['one_by_one_share_of_memcpy']:.0%} with pages one by one)\n"
        f"{figures['shards']:,} shards: opened in {figures['open_s']:.2f} s; first step at {figures['late_step']:,} "
        f"in {figures['resume_s']:.2f} s more, with {figures['packs_per_step']} packs; "
        f"state {figures['state_bytes']} bytes"
    )
    if options.json:
        print(json.dumps(figures))


def against_memcpy(path: Path, packs: int, rounds: int) -> dict[str, float]:
    dataset = open_dataset(path)
    shape = BatchShape(
        packs=1, budget=dataset.budget, geometry=dataset.geometry, pad_token=dataset.tokens.pad
    )
    order = np.random.default_rng(0).permutation(dataset.num_packs("train"))[:packs].tolist()
    buffers = empty_batch(shape)
    finished = [empty_batch(shape) for _ in order]
    for batch, number in zip(finished, order, strict=True):
        assemble(dataset, number, batch, shape)
    seconds = {name: np.full((rounds, len(order)), np.inf) for name in ("assembly", "one_by_one", "copy")}

    def timed(name: str, turn: int, place: int, function: Callable[[], None]) -> None:
        begin = time.perf_counter()
        function()
        seconds[name][turn, place] = time.perf_counter() - begin

    for turn in range(rounds):
        one, other = map_anew(path), map_anew(path)
        for place in range(len(order)):
            # Another pack, whose bytes are not in a cache of the processor.
            far = (place + len(order) // 2) % len(order)
            timed("assembly", turn, place, partial(assemble, one, order[place], buffers, shape))
            timed("copy", turn, place, partial(copy, finished[place], buffers))
            with mock.patch("trainer.data.batch.populate"):
                timed("one_by_one", turn, far, partial(assemble, other, order[far], buffers, shape))
    best = {name: float(values.min(axis=0).sum()) for name, values in seconds.items()}
    num_bytes = sum(getattr(buffers, field.name).nbytes for field in fields(Batch))
    return {
        "packs": len(order),
        "mb_per_pack": num_bytes / 1e6,
        "gb_per_s": num_bytes * len(order) / best["assembly"] / 1e9,
        "images_per_s": sum(len(dataset.pack("train", number).images) for number in order) / best["assembly"],
        "memcpy_gb_per_s": num_bytes * len(order) / best["copy"] / 1e9,
        "share_of_memcpy": best["copy"] / best["assembly"],
        "one_by_one_share_of_memcpy": best["copy"] / best["one_by_one"],
    }


def map_anew(path: Path) -> DataSet:
    dataset = open_dataset(path)
    for shard in dataset.shards:
        dataset.reader(shard).document_spans(0)
    return dataset


def assemble(dataset: DataSet, number: int, buffers: Batch, shape: BatchShape) -> None:
    packs, spans = [dataset.pack("train", number)], [dataset.document_spans("train", number)]
    fill_batch(buffers, packs, spans, shape)
    document_ends(spans, shape)
    frame_ends(packs, shape)


def copy(finished: Batch, buffers: Batch) -> None:
    for field in fields(Batch):
        getattr(buffers, field.name).numpy()[...] = getattr(finished, field.name).numpy()


def many_shards(path: Path, num_shards: int) -> dict[str, float]:
    """A data set of many shards with a few packs each; the shards are one file under many names."""
    write_packs(path, TINY, 4, num_shards=num_shards)
    begin = time.perf_counter()
    data = single(open_dataset(path))
    open_s = time.perf_counter() - begin
    late_step, packs_per_step = 987_654, 64
    begin = time.perf_counter()
    loader = Loader(
        data,
        split="train",
        seed=0,
        packs_per_microbatch=packs_per_step,
        accumulation=1,
        dp_rank=0,
        dp_size=1,
        device=torch.device("cpu"),
        start_step=late_step,
        decode_threads=1,
    )
    assert next(iter(loader)).index == late_step
    resume_s = time.perf_counter() - begin
    loader.close()
    state = {"step": late_step, "data": data.identity}
    return {
        "shards": num_shards,
        "open_s": open_s,
        "late_step": late_step,
        "packs_per_step": packs_per_step,
        "resume_s": resume_s,
        "state_bytes": len(json.dumps(state)),
    }


if __name__ == "__main__":
    main()
