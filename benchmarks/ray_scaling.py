"""Two workers against one, on an embedded Ray: scan of text, pack of pictures.

    python benchmarks/ray_scaling.py ../shared/data/photos/photos-jpeg-000000.tar --tokenizer TOKENIZER

The pictures of the tar are repeated until one worker packs them for some 20 s, and its captions are shuffled into
text until one worker scans that for as long. Runs with one worker and with two alternate, each in a new directory;
workers have started and loaded their libraries before a clock runs. Beside each run, how many processors the machine
had to give: (processor time of all its processes but idle ones) is what a busy machine takes away from the ratio.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from preprocess.budgets import BudgetConfig
from preprocess.config import PlanConfig, PreprocessConfig, RayConfig
from preprocess.faults import Limits
from preprocess.job import open_job
from preprocess.ray_job import RayExecutor
from preprocess.sources.text import TextConfig
from preprocess.sources.webdataset import WebDatasetConfig
from shared.geometry import Geometry

FILES = 24
WORKERS = (1, 2)


@dataclass(frozen=True)
class Times:
    """Seconds of the passes, and the mean number of busy processors meanwhile."""

    workers: int
    scan: float
    pack: float
    busy: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tar", type=Path, help="JPEGs and their captions, as webdataset")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=4800, help="at least; whole tars are repeated")
    parser.add_argument("--text", type=int, default=48, help="MB of text to scan")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        config = make_input(directory, options.tar, options.tokenizer, options.pictures, options.text)
        print(f"{'workers':>7}  {'scan s':>7}  {'pack s':>7}  {'busy processors':>15}")
        runs: list[Times] = []
        for _ in range(options.rounds):
            for workers in WORKERS:
                runs.append(run(config, directory / "out", workers))
                last = runs[-1]
                print(f"{workers:7}  {last.scan:7.1f}  {last.pack:7.1f}  {last.busy:15.2f}", flush=True)
    ratios = {step: ratio(runs, step) for step in ("scan", "pack")}
    print("one worker : two workers, medians  " + "  ".join(f"{k} {v:.2f}" for k, v in ratios.items()))
    if options.json:
        print(json.dumps({"ratios": ratios, "runs": [vars(one) for one in runs]}))


def make_input(directory: Path, tar: Path, tokenizer: Path, pictures: int, text: int) -> PreprocessConfig:
    """FILES tars of the pictures with new keys, and as many files of `text` MB in all."""
    with tarfile.open(tar) as archive:
        members = [(m.name, archive.extractfile(m)) for m in archive if m.isfile()]
        contents = [(Path(name), file.read()) for name, file in members if file]
    samples = sum(name.suffix == ".txt" for name, _ in contents)
    copies = max(1, round(pictures / samples / FILES))
    for number in range(FILES):
        with tarfile.open(directory / f"{number:03d}.tar", "w") as archive:
            for copy in range(copies):
                for name, data in contents:
                    member = tarfile.TarInfo(f"{number}-{copy}-{name.name}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    words = " ".join(data.decode() for name, data in contents if name.suffix == ".txt").split()
    write_texts(directory, np.array(words), text * 10**6 // FILES)
    sources = {
        "pictures": WebDatasetConfig(paths=(f"{directory}/*.tar",), max_reject_rate=1.0),
        "text": TextConfig(paths=(f"{directory}/*.jsonl",)),
    }
    return PreprocessConfig(
        output="set for each run",
        tokenizer=str(tokenizer),
        sources=sources,
        budget=BudgetConfig(S=4096, N=7, L=2048),
        geometry=Geometry(merge=2, max_patches_per_image=1024),
        # Many small shards: two workers that end a whole one apart would be the measurement.
        plan=PlanConfig(shard_bytes=16 << 20, window=1 << 20),
    )


def write_texts(directory: Path, words: np.ndarray, size: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(FILES):
        with open(directory / f"{number:03d}.jsonl", "w", encoding="utf-8") as file:
            while file.tell() < size:
                file.write(json.dumps({"text": " ".join(rng.choice(words, 500))}) + "\n")


def run(config: PreprocessConfig, output: Path, workers: int) -> Times:
    shutil.rmtree(output, ignore_errors=True)
    limits = Limits(config.limits.max_seconds, config.limits.max_memory)
    executor = RayExecutor(RayConfig(workers=workers), 0, limits)
    try:
        list(executor.map(load_libraries, range(4 * workers)))
        with open_job(replace(config, output=str(output))) as job:
            busy, began = busy_seconds(), time.perf_counter()
            job.scan(executor)
            scanned = time.perf_counter()
            job.plan(executor)
            planned = time.perf_counter()
            job.pack(executor)
            ended = time.perf_counter()
            busy = busy_seconds() - busy
    finally:
        executor.close()
    return Times(workers, scanned - began, ended - planned, busy / (ended - began))


def load_libraries(unit: int) -> int:
    import preprocess.pack

    time.sleep(0.5)  # so that every worker gets one
    return unit if preprocess.pack else 0


def busy_seconds() -> float:
    """Processor time of the whole machine since it started, without what it was idle."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _, _, irq, softirq, steal, *_ = map(int, file.readline().split()[1:])
    return (user + nice + system + irq + softirq + steal) / 100  # USER_HZ


def ratio(runs: list[Times], step: str) -> float:
    def seconds(workers: int) -> Iterator[float]:
        return (getattr(one, step) for one in runs if one.workers == workers)

    return statistics.median(seconds(1)) / statistics.median(seconds(2))


if __name__ == "__main__":
    main()
