"""The passes of a whole job beside each other: seconds of processor time per picture in scan, plan and pack.

    python benchmarks/passes.py ../shared/data/cc12m/cc12m-train-0000.tar ../shared/data/photos/photos-jpeg-000000.tar \
        --tokenizer TOKENIZER

The samples of each tar are repeated under other keys in one tar of `--samples`. One process; what a raw file costs by
itself, headers and hashes of the scan are included.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from preprocess.budgets import BudgetConfig
from preprocess.config import PreprocessConfig
from preprocess.executor import SerialExecutor
from preprocess.job import open_job
from preprocess.sources.webdataset import WebDatasetConfig
from shared.geometry import Geometry


def timed(work: Callable[[], object]) -> float:
    gc.collect()  # that of the pass before; a whole one takes 0.1 s, as long as the scan
    begin = time.process_time()
    work()
    return time.process_time() - begin


def repeat(source: Path, target: Path, samples: int) -> None:
    """A tar of `samples` samples: those of `source` again and again."""
    with tarfile.open(source) as tar:
        members = [(member.name, file.read()) for member in tar if (file := tar.extractfile(member))]
    keys = len({name.partition(".")[0] for name, _ in members})
    with tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(-(-samples // keys)):
            for name, content in members:
                info = tarfile.TarInfo(f"{number:06d}-{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def measure(tar: Path, tokenizer: Path, patches: int) -> dict[str, float]:
    """Processor time of the passes, and pictures packed, at a cap of `patches` per picture."""
    with tempfile.TemporaryDirectory() as directory:
        config = PreprocessConfig(
            output=f"{directory}/out",
            tokenizer=str(tokenizer),
            sources={"web": WebDatasetConfig(paths=(str(tar),))},
            budget=BudgetConfig(S=4096, N=7, L=2048),
            geometry=Geometry(max_patches_per_image=patches),
            executor="serial",
        )
        with open_job(config) as job:
            executor = SerialExecutor(0)
            seconds = {
                "scan": timed(lambda: job.scan(executor)),
                "plan": timed(lambda: job.plan(executor)),
                "pack": timed(lambda: job.pack(executor)),
            }
            images = job.finish()["splits"]["train"]["images"]
    return {**seconds, "images": images, "ratio": seconds["pack"] / seconds["scan"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("tars", type=Path, nargs="+")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for tar in arguments.tars:
            repeated = Path(directory, tar.name)
            repeat(tar, repeated, arguments.samples)
            measure(tar, arguments.tokenizer, 256)  # libraries and compiled code
            for patches in (256, 1024):
                figures[f"{tar.name} {patches}"] = measure(repeated, arguments.tokenizer, patches)
    if arguments.json:
        print(json.dumps(figures))
        return
    print("processor time per picture, ms      cap    scan    plan    pack   pack : scan")
    for name, line in figures.items():
        tar, patches = name.split()
        each = "".join(f"{1000 * line[step] / line['images']:8.3f}" for step in ("scan", "plan", "pack"))
        print(f"{tar:32} {patches:>6} {each} {line['ratio']:10.1f}")


if __name__ == "__main__":
    main()
