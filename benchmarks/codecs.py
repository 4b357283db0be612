"""The codecs beside each other on one data set of real pictures: size, quality, speed, and what the loader makes of it.

    python benchmarks/codecs.py runs/captions/dataset

Takes a finished data set of codec raw, whose packs hold resized pictures as patches. Every picture is encoded and
decoded alone, in patches; then the data set is stored by each codec in a temporary directory, and the trainer's
loader reads it. MB are 10^6 bytes of raw patches, whatever the codec. All sides run in turn, round by round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard

from shared.codecs import CODECS, image_decoder, image_encoder, store_patches
from shared.dataset import DataSet, describe_contract, fingerprint_of, open_dataset
from shared.files import write_json
from shared.shard_writer import ShardWriter
from trainer.data.loader import Loader
from trainer.data.mixture import single

THREADS = (1, 2)
Picture = tuple[np.ndarray, int, int, int]  # patches [t*h*w, P], t, h, w


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--jpeg_quality", type=int, default=95)
    parser.add_argument("--zstd_level", type=int, default=1)
    parser.add_argument(
        "--levels", type=int, nargs="*", default=[], help="zstd levels to compare, and nothing else"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset = open_dataset(options.dataset)
    pictures = load_pictures(dataset)
    num_bytes = sum(patches.nbytes for patches, *_ in pictures)
    print(f"{len(pictures)} pictures, {num_bytes / dataset.geometry.values_per_patch / len(pictures):.0f} patches on "
          f"average, {num_bytes / 1e6:.1f} MB raw, {options.rounds} rounds")  # fmt: skip
    if options.levels:
        figures = {
            "levels": [level_figures(dataset, pictures, level, options.rounds) for level in options.levels]
        }
    else:
        settings = {"jpeg_quality": options.jpeg_quality, "zstd_level": options.zstd_level}
        figures = {
            "plain_zstd_ratio": plain_zstd_ratio(pictures),
            "codecs": [
                codec_figures(dataset, pictures, codec, settings, options.rounds) for codec in CODECS[1:]
            ],
            "loader": loader_figures(dataset, settings, options.rounds),
        }
    if options.json:
        print(json.dumps({"pictures": len(pictures), **figures}))


def load_pictures(dataset: DataSet) -> list[Picture]:
    if dataset.codec != "raw":
        raise SystemExit(
            f"{dataset.path}: codec is {dataset.codec!r}; the benchmark starts from a raw data set"
        )
    packs = [dataset.pack(split, n) for split in dataset.splits for n in range(dataset.num_packs(split))]
    return [
        (np.array(pack.read_image(i)), *(int(image[name]) for name in ("t", "h", "w")))
        for pack in packs
        for i, image in enumerate(pack.images)
    ]


def plain_zstd_ratio(pictures: Sequence[Picture]) -> float:
    """What Zstandard alone makes of the patches."""
    compress = zstandard.ZstdCompressor(level=3).compress
    stored = sum(len(compress(patches.data)) for patches, *_ in pictures)
    ratio = sum(patches.nbytes for patches, *_ in pictures) / stored
    print(f"Zstandard level 3 on the patches themselves: {ratio:.2f} times smaller than raw")
    return ratio


def codec_figures(
    dataset: DataSet, pictures: Sequence[Picture], codec: str, settings: dict[str, int], rounds: int
) -> dict[str, Any]:
    encode = image_encoder(codec, dataset.geometry, **settings)
    decode = image_decoder(codec, dataset.geometry)
    assert encode is not None and decode is not None
    frames = [np.frombuffer(encode(*picture), np.uint8) for picture in pictures]
    outs = [np.empty_like(patches) for patches, *_ in pictures]

    def decode_one(number: int) -> None:
        decode(frames[number], *pictures[number][1:], outs[number])

    speeds: dict[str, list[float]] = {}
    num_bytes = sum(patches.nbytes for patches, *_ in pictures)
    for _ in range(rounds):
        for threads in THREADS:
            with ThreadPoolExecutor(threads) as pool:
                for name, run in (("encode", lambda n: encode(*pictures[n])), ("decode", decode_one)):
                    seconds = timed(lambda: list(pool.map(run, range(len(frames)))))  # noqa: B023
                    speeds.setdefault(f"{name}_{threads}_mb_s", []).append(num_bytes / seconds / 1e6)
    psnr = [psnr_of(out, patches) for out, (patches, *_) in zip(outs, pictures, strict=True)]
    stored = sum(frame.nbytes for frame in frames)
    figures: dict[str, Any] = {
        "codec": codec,
        "ratio": num_bytes / stored,
        "bytes_per_patch": stored / (num_bytes / dataset.geometry.values_per_patch),
        "psnr_median_db": None if codec == "zstd" else float(np.median(psnr)),
        "psnr_p5_db": None if codec == "zstd" else float(np.percentile(psnr, 5)),
        **{name: float(np.median(values)) for name, values in speeds.items()},
    }
    if codec == "zstd":
        assert psnr == [np.inf] * len(pictures)
        quality = "lossless"
    else:
        quality = f"PSNR {figures['psnr_median_db']:.1f} dB in the median, {figures['psnr_p5_db']:.1f} at 5 %"
    print(
        f"{codec}: {figures['ratio']:.2f} times smaller, {figures['bytes_per_patch']:.1f} bytes per patch, {quality}; "
        f"encode {figures['encode_1_mb_s']:.0f} MB/s, two threads {figures['encode_2_mb_s']:.0f}; "
        f"decode {figures['decode_1_mb_s']:.0f}, two threads {figures['decode_2_mb_s']:.0f}"
    )
    return figures


def level_figures(dataset: DataSet, pictures: Sequence[Picture], level: int, rounds: int) -> dict[str, Any]:
    encode = image_encoder("zstd", dataset.geometry, jpeg_quality=95, zstd_level=level)
    assert encode is not None
    encode(*pictures[0])  # compiles
    seconds = [timed(lambda: [encode(*picture) for picture in pictures]) for _ in range(rounds)]
    num_bytes = sum(patches.nbytes for patches, *_ in pictures)
    figures = {
        "level": level,
        "ratio": num_bytes / sum(len(encode(*picture)) for picture in pictures),
        "encode_mb_s": num_bytes / float(np.median(seconds)) / 1e6,
    }
    print(f"level {level:2}: {figures['ratio']:.2f} times smaller, encode {figures['encode_mb_s']:.0f} MB/s")
    return figures


def loader_figures(dataset: DataSet, settings: dict[str, int], rounds: int) -> list[dict[str, Any]]:
    """Raw patches per second that the loader hands over while nothing else runs, one pack per step."""
    found: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        paths = {codec: store_by(dataset, Path(directory) / codec, codec, settings) for codec in CODECS}
        for _ in range(rounds):
            for codec, threads in itertools.product(CODECS, THREADS):
                if codec == "raw" and threads > 1:
                    continue
                found.setdefault((codec, threads), []).append(loaded_mb_s(paths[codec], threads))
    lines = [
        {"codec": codec, "threads": threads, "mb_s": float(np.median(values))}
        for (codec, threads), values in found.items()
    ]
    for line in lines:
        print(f"loader, {line['codec']:4} decode_threads {line['threads']}: {line['mb_s']:,.0f} MB/s")
    return lines


def store_by(dataset: DataSet, path: Path, codec: str, settings: dict[str, int]) -> Path:
    """The training packs of the data set in one shard of another codec."""
    contract = describe_contract(dataset.budget, dataset.geometry, dataset.tokens, codec)
    encode = image_encoder(codec, dataset.geometry, **settings)
    (path / "shards").mkdir(parents=True)
    shard = path / "shards" / "train-00000.parquet"
    writer = ShardWriter(shard, dataset.budget.S, fingerprint_of(contract))
    for number in range(dataset.num_packs("train")):
        pack = dataset.pack("train", number)
        images = pack.images.copy()
        stored = store_patches(pack.stored, images, encode)
        writer.append(replace(pack, stored=stored, images=images), dataset.documents("train", number))
    writer.close()
    entry = {"name": shard.name, "split": "train", "packs": writer.num_packs, "bytes": 0, "checksum": ""}
    manifest = {**contract, "fingerprint": fingerprint_of(contract), "shards": [entry]}
    write_json(path / "dataset.json", {**manifest, "account": dataset.manifest["account"]})
    return path


def loaded_mb_s(path: Path, threads: int) -> float:
    dataset = open_dataset(path)
    loader = Loader(
        single(dataset),
        split="train",
        seed=0,
        packs_per_microbatch=1,
        accumulation=1,
        dp_rank=0,
        dp_size=1,
        device=torch.device("cpu"),
        start_step=0,
        decode_threads=threads,
    )
    steps = iter(loader)
    for _ in range(3):  # maps the shard, compiles the decoder, and takes what was loaded meanwhile
        next(steps)
    begin = time.perf_counter()
    count = max(8, dataset.num_packs("train"))
    patches = sum(step.counts.patches for step in itertools.islice(steps, count))
    seconds = time.perf_counter() - begin
    loader.close()
    return patches * dataset.geometry.values_per_patch / seconds / 1e6


def psnr_of(found: np.ndarray, expected: np.ndarray) -> float:
    error = np.mean((found.astype(np.float32) - expected) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def timed(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
