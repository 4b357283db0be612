"""The plan at scale: the real driver and the real tasks over synthetic index files, in processes of their own.

    python benchmarks/plan.py --samples 1000000 --lengths LENGTHS.py
    python benchmarks/plan.py --samples 100000000 --lengths LENGTHS.py --distinct_files 100

Seven files of captioned pictures to three of interleaved documents, 100,000 samples each, all told; of these the first
`distinct_files` are written and the others are links to them. `LENGTHS.py` is a module with `cc12m(n, seed)` and
`obelics(n, seed)`; without it lengths are log-normal. The pictures are never decoded, so there are none.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from preprocess.config import PlanConfig
from preprocess.index import COUNTS, INDEX_OPTIONS, ROWS_PER_BLOCK, IndexedUnit
from preprocess.plan import make_plan, planned_shards, read_shard_plan
from preprocess.samples import IMAGE, INDEX_SCHEMA, SEGMENT_TYPE, SEGMENTS_TYPE, TEXT
from preprocess.sources.base import SourceConfig
from shared.geometry import Budget, Geometry, resize_grid, visual_tokens
from shared.tokens import TokenIds

SAMPLES_PER_FILE = 100_000
GEOMETRY = Geometry(patch_size=16, merge=2, max_patches_per_image=1024)
BUDGET = Budget(S=8192, N=3, L=6144)
IDS = TokenIds(
    bos=1, eos=2, pad=0, image=3, begin_image=4, end_image=5, vocabulary_size=128_256, tokenizer_sha256=""
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--distinct_files", type=int, default=20)
    parser.add_argument("--lengths", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--window", type=int, default=PlanConfig().window)
    parser.add_argument(
        "--directory", type=Path, help="where the index and the plan go; a new one, removed at the end"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="plan-", dir=options.directory))
    try:
        figures = measure(directory, options)
    finally:
        shutil.rmtree(directory)
    report(figures)
    if options.json:
        print(json.dumps(figures))


def measure(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    units = write_index(directory, options)
    num_samples = len(units) * SAMPLES_PER_FILE
    before, cpu_before = peak_bytes(resource.RUSAGE_SELF), cpu_seconds()
    stages: dict[str, float] = {}
    begin = time.perf_counter()
    summary = make_plan(
        units,
        {name: SourceConfig(paths=("none",), too_long="split") for name in ("captions", "documents")},
        directory / "plan",
        budget=BUDGET,
        geometry=GEOMETRY,
        ids=IDS,
        config=PlanConfig(window=options.window, validation_fraction=0.001),
        seed=0,
        run=runner(options.processes, stages),
    )
    total_s = time.perf_counter() - begin
    files = [path for path in (directory / "plan").rglob("*") if path.is_file()]
    return {
        "samples": num_samples,
        "processes": options.processes,
        "seconds": total_s,
        "stages": stages,
        "samples_per_s": num_samples / total_s,
        "cpu_seconds": (cpu_s := cpu_seconds() - cpu_before),
        "samples_per_cpu_s": num_samples / cpu_s,
        "driver_start_mb": before / 1e6,
        "driver_peak_mb": peak_bytes(resource.RUSAGE_SELF) / 1e6,
        "worker_peak_mb": peak_bytes(resource.RUSAGE_CHILDREN) / 1e6,
        "index_bytes_per_sample": sum(unit.path.stat().st_size for unit in units) / num_samples,
        "plan_bytes_per_sample": sum(path.stat().st_size for path in files) / num_samples,
        "windows": len(summary["windows"]),
        "shards": sum(1 for _ in planned_shards(summary)),
        **fill(directory / "plan", summary),
    }


def report(figures: dict[str, Any]) -> None:
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in figures["stages"].items())
    print(
        f"{figures['samples']:,} samples in {figures['windows']:,} windows and {figures['shards']:,} shards, "
        f"{figures['processes']} process(es)\n"
        f"{figures['seconds']:.1f} s ({stages}), {figures['samples_per_s']:,.0f} samples/s; "
        f"{figures['samples_per_cpu_s']:,.0f} samples per second of processor time ({figures['cpu_seconds']:.0f} s)\n"
        f"peak memory: driver {figures['driver_peak_mb']:,.0f} MB, of which {figures['driver_start_mb']:,.0f} MB at "
        f"the start; worker {figures['worker_peak_mb']:,.0f} MB\n"
        f"bytes per sample: index {figures['index_bytes_per_sample']:.1f}, plan "
        f"{figures['plan_bytes_per_sample']:.1f}\n"
        f"fill of the first train windows: tokens {figures['fill_tokens']:.1%}, vision {figures['fill_vision']:.1%}"
    )
    if figures["samples"] >= 10_000_000:  # below, the driver grows by what Python keeps, not by what it holds
        grown = (figures["driver_peak_mb"] - figures["driver_start_mb"]) / figures["samples"]
        hours = 1e9 / figures["samples_per_cpu_s"] / 3600
        print(
            f"10^9 samples at these rates: {hours:.2f} hours of processor time, driver "
            f"{figures['driver_start_mb'] + grown * 1e9:,.0f} MB"
        )


def runner(processes: int, stages: dict[str, float]) -> Callable[..., list[Any]]:
    """Runs tasks in processes, a few of them scheduled at a time; adds the seconds of each kind to `stages`."""

    def run(function: Callable[[Any], Any], tasks: Sequence[Any], *, label: str, total: int) -> list[Any]:
        begin, results = time.perf_counter(), []
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            waiting = set()
            for task in tasks:
                waiting.add(pool.submit(function, task))
                if len(waiting) > 2 * processes:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    results += [future.result() for future in done]
            results += [future.result() for future in waiting]
        stages[label] = time.perf_counter() - begin
        print(f"{label}: {total:,} tasks, {stages[label]:.1f} s", flush=True)
        return results

    return run


def cpu_seconds() -> float:
    """Processor time of this process and of the tasks that have ended: it tells more than a clock on a busy machine."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def peak_bytes(who: int) -> int:
    return resource.getrusage(who).ru_maxrss * 1024


def fill(plan: Path, summary: dict[str, Any], windows: int = 3) -> dict[str, float]:
    """Share of both budgets that holds data, in the first windows."""
    first = {"windows": summary["windows"][:windows]}
    packs = tokens = patches = 0
    for shard in planned_shards(first):
        table = read_shard_plan(plan / shard.plan, shard.row_group)
        packs += shard.packs
        tokens += int((table["end"].to_numpy() - table["start"].to_numpy()).sum())
        segments = table["segments"].combine_chunks().flatten()
        t, h, w = (segments.field(name).to_numpy().astype(np.int64) for name in ("t", "h", "w"))
        patches += int((t * h * w).sum())
    return {
        "fill_tokens": tokens / (packs * BUDGET.S),
        "fill_vision": patches / (packs * BUDGET.N * BUDGET.L),
    }


# The index


def write_index(directory: Path, options: argparse.Namespace) -> list[IndexedUnit]:
    """Index files as the scan writes them, in a process of their own so that the driver stays small."""
    count = max(1, options.samples // SAMPLES_PER_FILE)
    units: list[IndexedUnit] = []
    for number in range(count):
        source = "documents" if number % 10 in (2, 5, 8) else "captions"
        path = directory / "index" / source / f"{number:06d}.parquet"
        units.append(IndexedUnit(source, f"/data/{source}/{number:06d}.tar", path))
    begin = time.perf_counter()
    distinct = units[: options.distinct_files]
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        jobs = [
            (unit.source, unit.path, number, options.lengths, GEOMETRY)
            for number, unit in enumerate(distinct)
        ]
        list(pool.map(write_file, jobs))
    by_source = {name: [u.path for u in distinct if u.source == name] for name in ("captions", "documents")}
    for number, unit in enumerate(units[len(distinct) :]):
        same = by_source[unit.source]
        os.link(same[number % len(same)], unit.path)
    print(
        f"index: {len(distinct)} files and {count - len(distinct)} links, {time.perf_counter() - begin:.1f} s"
    )
    return units


def write_file(job: tuple[str, Path, int, Path | None, Geometry]) -> None:
    source, path, seed, lengths, geometry = job
    text_n, image_offsets, sizes_i2 = table_of(source, seed, lengths)
    count = len(text_n)
    rng = np.random.default_rng([seed, 7])
    grid_i2 = resize_grid(sizes_i2[:, 0].astype(np.int64), sizes_i2[:, 1].astype(np.int64), geometry)
    images = np.diff(image_offsets)
    # Every picture is followed by its share of the text.
    share_i = np.repeat(np.maximum(1, text_n // images), images)
    segments = interleave(share_i, sizes_i2, grid_i2, geometry.merge)
    struct = pa.StructArray.from_arrays(
        [pa.array(segments[field.name], field.type) for field in SEGMENT_TYPE], fields=list(SEGMENT_TYPE)
    )
    offsets = pa.array((2 * image_offsets).astype(np.int32))
    key_hash, content_hash = rng.integers(0, 1 << 64, (2, count), np.uint64)
    columns = [
        pa.array([f"{seed:05d}{number:06d}" for number in range(count)]),
        pa.array(key_hash),
        pa.array(content_hash),
        pa.ListArray.from_arrays(offsets, struct, type=SEGMENTS_TYPE),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    counts = {
        "read": count,
        "samples": count,
        "text_tokens": int(share_i.sum()),
        "media": len(sizes_i2),
        "rejected": {},
        "media_dropped": {},
    }
    with pq.ParquetWriter(path, INDEX_SCHEMA, **INDEX_OPTIONS) as writer:
        writer.write_table(pa.Table.from_arrays(columns, schema=INDEX_SCHEMA), row_group_size=ROWS_PER_BLOCK)
        writer.add_key_value_metadata({COUNTS.decode(): json.dumps(counts)})


def interleave(
    text_i: npt.NDArray[Any], sizes_i2: npt.NDArray[Any], grid_i2: npt.NDArray[Any], merge: int
) -> dict[str, Any]:
    """Fields of the segments picture, text, picture, text, .."""
    count = len(text_i)
    is_image = np.arange(2 * count) % 2 == 0

    def both(image: npt.NDArray[Any] | int, text: npt.NDArray[Any] | int) -> npt.NDArray[Any]:
        values = np.empty((count, 2), np.int64)
        values[:, 0], values[:, 1] = image, text
        return values.reshape(-1)

    size = sizes_i2[:, 0].astype(np.int64) * sizes_i2[:, 1] // 8
    return {
        "kind": np.where(is_image, IMAGE, TEXT),
        "file": pa.array(["/data/captions/000000.tar", ""]).take(pa.array((~is_image).astype(np.int32))),
        "offset": both(np.cumsum(size + 512), np.cumsum(text_i)),
        "size": both(size, 0),
        "tokens": both(visual_tokens(1, grid_i2[:, 0], grid_i2[:, 1], merge) + 2, text_i),
        "height": both(sizes_i2[:, 0], 0),
        "width": both(sizes_i2[:, 1], 0),
        "t": both(1, 0),
        "h": both(grid_i2[:, 0], 0),
        "w": both(grid_i2[:, 1], 0),
        "state": both(0, 0),
    }


def table_of(source: str, seed: int, lengths: Path | None) -> tuple[npt.NDArray[Any], ...]:
    """Text tokens [n], image offsets [n + 1], height and width of every image [images, 2]."""
    count = SAMPLES_PER_FILE
    if lengths is not None:
        specification = importlib.util.spec_from_file_location("lengths", lengths)
        assert specification is not None and specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        table = (module.cc12m if source == "captions" else module.obelics)(count, seed)
        return table.n_text_tokens, table.image_offsets, table.image_hw
    rng = np.random.default_rng([seed, 1])
    documents = source == "documents"
    images = rng.geometric(0.4, count) if documents else np.ones(count, np.int64)
    text = np.exp(rng.normal(6.5 if documents else 3.1, 0.6, count)).astype(np.int64) + 3
    sizes = np.exp(rng.normal(6.4, 0.3, (int(images.sum()), 2))).astype(np.int64)
    return text, np.concatenate([[0], np.cumsum(images)]), sizes


if __name__ == "__main__":
    main()
