"""The most memory that a worker holds in scan and in pack (VmHWM), for inputs that are large in every way.

    python benchmarks/memory.py --tokenizer ../shared/data/tokenizer-bpe8k

    pictures     a tar of 30 pictures of 64 megapixels: JPEG, PNG and WebP
    text         a JSONL of --text MB
    row group    a Parquet whose one row group holds --row-group MB of pictures

Budget, geometry and shards of 512 MiB are those of configs/preprocess/captions.toml. Each pass runs on one worker of
an embedded Ray, without the limit that ends a worker, so that the figure is what it takes. Files that a worker maps
count as far as they are in memory.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from preprocess.config import PreprocessConfig, RayConfig
from preprocess.faults import Limits
from preprocess.job import open_job
from preprocess.ray_job import RayExecutor
from preprocess.sources import AnySource
from preprocess.sources.captions import CaptionsConfig
from preprocess.sources.text import TextConfig
from preprocess.sources.webdataset import WebDatasetConfig
from shared.config import load_config

CONFIG = Path(__file__).resolve().parents[1] / "configs/preprocess/captions.toml"
SIDE = 8000  # 64 megapixels, what limits.max_pixels allows
SIDE_OF_WEBP = 7480  # seven eighths of it
LARGE = 30


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--text", type=int, default=2000, help="MB")
    parser.add_argument("--row-group", type=int, default=1000, help="MB")
    parser.add_argument("--only", choices=CASES, nargs="*", default=list(CASES))
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    found: dict[str, dict[str, int]] = {}
    for name in options.only:
        with tempfile.TemporaryDirectory() as directory:
            source = CASES[name](Path(directory), options)
            found[name] = measure(source, Path(directory), options.tokenizer)
        line = "  ".join(f"{step} {peak / 1e6:5.0f} MB" for step, peak in found[name].items())
        print(f"{name:9}  {line}", flush=True)
    if options.json:
        print(json.dumps(found))


def measure(source: AnySource, directory: Path, tokenizer: Path) -> dict[str, int]:
    """Peaks of the worker of each pass, in bytes."""
    config = load_config(PreprocessConfig, CONFIG, [])
    config = replace(
        config,
        output=str(directory / "out"),
        tokenizer=str(tokenizer),
        sources={"large": replace(source, max_reject_rate=1.0)},
    )
    peaks: dict[str, int] = {}
    with open_job(config) as job:
        for step in ("scan", "plan", "pack"):
            executor = Measuring(RayConfig(workers=1), 0, Limits(3600, 1 << 40))
            try:
                getattr(job, step)(executor)
            finally:
                executor.close()
            peaks[step] = executor.peak
        account = job.finish()["account"]["large"]
    assert account["packed"] + account["split_parts"] > 0 and not account["rejected"], account
    return peaks


class Measuring(RayExecutor):
    """Notes the highest peak of the workers."""

    peak = 0

    def map(self, function: Callable[[Any], Any], units: Sequence[Any]) -> Iterator[Any]:
        for result, peak in super().map(partial(with_peak, function), units):
            self.peak = max(self.peak, peak)
            yield result


def with_peak(function: Callable[[Any], Any], unit: Any) -> tuple[Any, int]:
    result = function(unit)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return result, 1024 * int(line.split()[1])


def picture(side: int) -> Image.Image:
    """Smooth with a little grain: of a size on disk as photographs have it."""
    small = Image.effect_noise((side // 8, side // 8), 60).convert("RGB")
    return small.resize((side, side), Image.Resampling.BICUBIC)


def large_pictures(directory: Path, options: argparse.Namespace) -> AnySource:
    image, smaller = picture(SIDE), picture(SIDE_OF_WEBP)
    kinds: dict[str, dict[str, Any]] = {
        "JPEG": {"quality": 85},
        "PNG": {"compress_level": 1},
        "WEBP": {"quality": 60, "method": 0},
    }
    encoded = {
        kind: encode(smaller if kind == "WEBP" else image, kind, **settings)
        for kind, settings in kinds.items()
    }
    with tarfile.open(directory / "large.tar", "w") as archive:
        for number in range(LARGE):
            kind = list(kinds)[number % len(kinds)]
            add(archive, f"{number:03d}.{kind.lower()}", encoded[kind])
            add(archive, f"{number:03d}.txt", f"picture {number}".encode())
    return WebDatasetConfig(paths=(str(directory / "large.tar"),))


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def encode(image: Image.Image, kind: str, **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def long_jsonl(directory: Path, options: argparse.Namespace) -> AnySource:
    rng = np.random.default_rng(0)
    words = np.array(["".join(rng.choice(list("etaoinshrdlu"), rng.integers(2, 9))) for _ in range(5000)])
    with open(directory / "long.jsonl", "w", encoding="utf-8") as file:
        while file.tell() < options.text * 10**6:
            file.write(json.dumps({"text": " ".join(rng.choice(words, 2000))}) + "\n")
    return TextConfig(paths=(str(directory / "long.jsonl"),))


def one_row_group(directory: Path, options: argparse.Namespace) -> AnySource:
    data = encode(picture(1024), "JPEG", quality=90)
    count = options.row_group * 10**6 // len(data)
    table = pa.table({"image": [data] * count, "caption": [f"picture {n}" for n in range(count)]})
    path = directory / "one.parquet"
    pq.write_table(table, path, row_group_size=count, compression="none", use_dictionary=False)
    return CaptionsConfig(paths=(str(path),))


CASES: dict[str, Callable[[Path, argparse.Namespace], AnySource]] = {
    "pictures": large_pictures,
    "text": long_jsonl,
    "row group": one_row_group,
}


if __name__ == "__main__":
    main()
