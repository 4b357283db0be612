"""Budgets that choose themselves: the N and L found for given S, and what they fill of a million samples.

    python benchmarks/budgets.py --lengths LENGTHS.py

Seven files of captioned pictures to three of interleaved documents, 100,000 samples each, as `benchmarks/plan.py`
writes them. The budget is chosen by the sample that a job would draw; then all samples are packed under it, in the
windows of a plan, one after another in one process.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from plan import IDS, SAMPLES_PER_FILE, write_file

from preprocess.budgets import BudgetConfig
from preprocess.config import PreprocessConfig
from preprocess.index import IndexedUnit, read_blocks
from preprocess.packing.budgets import BudgetPoint
from preprocess.plan import Choice, choose_budget
from preprocess.plan.budget import as_samples, measure
from preprocess.report.budget import budget_lines
from preprocess.sources.text import TextConfig
from shared.geometry import Geometry

# merge, cap, S.
SETTINGS = [(2, 1024, 8192), (1, 256, 4096)]
SOURCES = ("captions", "documents")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=Path)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--curve", action="store_true", help="print every point that was looked at")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for merge, cap, length in SETTINGS:
        geometry = Geometry(merge=merge, max_patches_per_image=cap)
        with tempfile.TemporaryDirectory() as directory:
            units = write_files(
                Path(directory), options.samples // SAMPLES_PER_FILE, options.lengths, geometry
            )
            config = config_of(directory, geometry, length)
            begin = time.process_time()
            choice = choose_budget(units, config, IDS)
            seconds = time.process_time() - begin
            if options.curve:
                print("\n".join(budget_lines(choice.record, explain=True)))
            point = pack_all(units, config, choice)
        print(
            f"m={merge}, cap {cap}, S={length}: N={choice.budget.N}, L={choice.budget.L} of "
            f"{len(choice.record['curve'])} tried in {seconds:.1f} s\n"
            f"  {point['samples']:,} samples: tokens {point['tokens']:.2%}, patches {point['vision']:.2%}, "
            f"packs/bound {point['bound']:.4f}, rejected {point['rejected']:.3%}"
        )
        rows.append({"merge": merge, "cap": cap, "seconds": seconds, **choice.record, "all": point})
    if options.json:
        print(json.dumps(rows))


def write_files(directory: Path, count: int, lengths: Path | None, geometry: Geometry) -> list[IndexedUnit]:
    units: list[IndexedUnit] = []
    for number in range(count):
        source = SOURCES[number % 10 in (2, 5, 8)]
        path = directory / source / f"{number:06d}.parquet"
        write_file((source, path, number, lengths, geometry))
        units.append(IndexedUnit(source, f"/data/{source}/{number:06d}.tar", path))
    return units


def config_of(directory: str, geometry: Geometry, length: int) -> PreprocessConfig:
    return PreprocessConfig(
        output=directory,
        tokenizer="",
        sources={name: TextConfig(paths=("none",)) for name in SOURCES},
        budget=BudgetConfig(S=length, N="auto", L="auto"),
        geometry=geometry,
    )


def pack_all(units: list[IndexedUnit], config: PreprocessConfig, choice: Choice) -> dict[str, float]:
    """Fills over all samples, in windows that hold of every file what it has of all."""
    blocks = [
        (number, table["segments"].combine_chunks())
        for number, unit in enumerate(units)
        for table in read_blocks(unit.path, ["segments"])
    ]
    order = _evenly([units[number].source for number, _ in blocks])
    per_window = config.plan.window // 1024
    points: list[tuple[BudgetPoint, int]] = []
    for begin in range(0, len(order), per_window):
        own = [blocks[place] for place in order[begin : begin + per_window]]
        samples = as_samples(own)
        names = [unit.source for unit in units]
        points.append((measure(samples, names, choice.budget, config, IDS), len(samples)))
    packs = sum(point.packs for point, _ in points)
    tokens = sum(point.tokens * point.packs for point, _ in points) / packs
    vision = sum(point.vision * point.packs for point, _ in points) / packs
    samples = sum(count for _, count in points)
    return {
        "samples": samples,
        "tokens": tokens,
        "vision": vision,
        "bound": 1 / max(tokens, vision),
        "rejected": sum(point.rejected * count for point, count in points) / samples,
        "packs": packs,
    }


def _evenly(sources: list[str]) -> list[int]:
    """The blocks of every source, shuffled, at equal distances: any stretch has of each its share, as in a plan."""
    rng, names = np.random.default_rng(0), np.array(sources)
    place = np.empty(len(names))
    for source in SOURCES:
        own = np.flatnonzero(names == source)
        place[rng.permutation(own)] = (np.arange(len(own)) + rng.random()) / max(1, len(own))
    return np.argsort(place).tolist()


if __name__ == "__main__":
    main()
