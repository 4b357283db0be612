"""One core, from JPEG bytes to packed rows in a shard: this pipeline beside the one of torchtitan's VLM experiment.

    python benchmarks/images.py ../shared/data/cc12m/cc12m-train-0000.tar --tokenizer ../shared/data/tokenizer-bpe8k

Baseline, rebuilt from its description: Pillow decode, Pillow bicubic resize, normalization in float64, einops
patches, coordinates of every patch, zero padding to the cap, batches of 10 pictures; it keeps them in memory, this
pipeline also writes its rows. Both tokenize the captions
and resize to the same grid. Beside them the bound, libjpeg-turbo's full decode and the resize and nothing else,
and how near `load_image` alone comes to it. `shard` is what is left of ours beside `load_image`, `write` what writing
as many bytes and fsync alone take. All run in turn, round by round, so that ratios hold when the machine's
speed drifts; seconds are of processor time, so that they hold beside other work.

Photographs of 12 megapixels are made of the pictures themselves, laid side by side pixel by pixel: real detail at
the density of a large picture.

Then what following profiles costs the pictures that have one of other colours than sRGB's, and last what scaled
decoding does to the result: PSNR against the full decode of every picture that it applies to.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from einops import rearrange
from PIL import Image

from preprocess.config import ImageConfig, ImageLimits
from preprocess.images import decode, load_image, read_header, resize
from preprocess.images.colour import profile_of
from shared.geometry import Geometry, resize_grid, row_offsets, write_patches
from shared.schema import IMAGE_DTYPE, Document, Pack
from shared.shard_writer import ShardWriter
from shared.tokens import TextTokenizer, load_tokenizer

LIMITS, CONFIG = ImageLimits(), ImageConfig()
CAPS = [(1, 256), (2, 1024)]  # merge, cap
BASELINE_BATCH = 10  # pictures per batch, its default
MARGINS = (1.0, 1.25, 1.5, 2.0)


@dataclass(frozen=True)
class Picture:
    data: bytes
    caption: str
    height: int
    width: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tars", type=Path, nargs="+", help="JPEGs and their captions, as webdataset")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(options.tokenizer)
    tars = [read_tar(path) for path in options.tars]
    groups = {path.name: pictures for path, pictures in zip(options.tars, tars, strict=True)}
    groups["12 megapixels"] = mosaics([p for pictures in tars for p in pictures])
    speeds = [
        measure(name, pictures, Geometry(merge=merge, max_patches_per_image=cap), tokenizer, options.rounds)
        for name, pictures in groups.items()
        for merge, cap in CAPS
    ]
    pictures = [p for pictures in tars for p in pictures]
    profiles = [profile_cost(pictures, merge, cap, options.rounds) for merge, cap in CAPS]
    errors = [scaling_error(list(groups.values()), margin) for margin in MARGINS]
    show(speeds, profiles, errors, options.rounds)
    if options.json:
        print(json.dumps({"speeds": speeds, "profiles": profiles, "scaling": errors}))


def show(
    speeds: list[dict[str, Any]], profiles: list[dict[str, Any]], errors: list[dict[str, Any]], rounds: int
) -> None:
    print(
        f"one thread, median of {rounds} rounds; images/s                       of the bound: packed, load_image"
    )
    print(
        "pictures                      cap   ours   baseline  ratio   bound                        header : pack"
        "  ms: shard, write"
    )
    for row in speeds:
        print(
            f"{row['pictures']:3} {row['name']:24} {row['cap']:5} {row['images_per_s']:6.0f} "
            f"{row['baseline_images_per_s']:10.1f} {row['ratio']:6.2f} {row['bound_images_per_s']:7.0f} "
            f"{row['of_bound']:12.0%} {row['load_of_bound']:12.0%} {'1 :':>6} {row['scan_ratio']:<5.0f} "
            f"{row['shard_ms']:6.2f} {row['written_ms']:6.2f}"
        )
    for row in profiles:
        print(
            f"{row['pictures']} of {row['of']} pictures have a profile of other colours; cap {row['cap']}: "
            f"load_image takes {row['with_ms']:.2f} ms with, {row['without_ms']:.2f} ms without following it"
        )
    print("scaled decoding   margin   pictures   PSNR in dB: median   5 %   least")
    for row in errors:
        used = "  <- in use" if row["margin"] == decode.MARGIN else ""
        print(
            f"{row['margin']:24} {row['pictures']:10} {row['median']:20.1f} {row['p5']:5.1f} {row['least']:7.1f}{used}"
        )


def read_tar(path: Path) -> list[Picture]:
    with tarfile.open(path) as tar:
        content = {m.name: file.read() for m in tar if (file := tar.extractfile(m))}
    pictures: list[Picture] = []
    for name, data in content.items():
        # Colours of ink are no part of the baseline.
        if name.endswith(".jpg") and Image.open(io.BytesIO(data)).mode != "CMYK":
            caption = content.get(name[:-4] + ".txt", b"").decode()
            pictures.append(picture(data, caption))
    return pictures


def picture(data: bytes, caption: str) -> Picture:
    header = read_header(io.BytesIO(data), limits=LIMITS)
    return Picture(data, caption, header.height, header.width)


def mosaics(
    pictures: Sequence[Picture], count: int = 4, height: int = 3000, width: int = 4000
) -> list[Picture]:
    """JPEGs of quality 92 and 4:2:0, filled with rows of pictures in a shuffled order."""
    tiles = [tile for p in pictures if min((tile := simplejpeg.decode_jpeg(p.data)).shape[:2]) >= 300]
    made: list[Picture] = []
    for seed in range(count):
        generator = np.random.default_rng(seed)
        whole_hwc = np.empty((height, width, 3), np.uint8)
        for top in range(0, height, 300):
            left = 0
            while left < width:
                tile = tiles[generator.integers(len(tiles))][:300, : width - left]
                whole_hwc[top : top + 300, left : left + tile.shape[1]] = tile
                left += tile.shape[1]
        made.append(
            picture(simplejpeg.encode_jpeg(whole_hwc, quality=92, colorsubsampling="420"), "many pictures")
        )
    return made


def measure(
    name: str, pictures: Sequence[Picture], geometry: Geometry, tokenizer: TextTokenizer, rounds: int
) -> dict[str, Any]:
    grids = grids_of(pictures, geometry)

    def ours() -> None:
        with tempfile.TemporaryDirectory() as directory:
            write_shard(Path(directory) / "shard", pictures, grids, geometry, tokenizer)

    def load() -> None:
        for p, grid in zip(pictures, grids, strict=True):
            load_one(p, grid, geometry, CONFIG)

    def theirs() -> None:
        tokenizer.encode([p.caption for p in pictures])
        for start in range(0, len(pictures), BASELINE_BATCH):
            batch = zip(pictures[start : start + BASELINE_BATCH], grids[start:], strict=False)
            rows = [baseline_patches(p.data, h, w, geometry) for p, (h, w) in batch]
            for column in zip(*rows, strict=True):
                torch.stack(column)

    def bound() -> None:
        for p, (h, w) in zip(pictures, grids, strict=True):
            resize(simplejpeg.decode_jpeg(p.data), h, w, geometry)

    rows = memoryview(bytes(geometry.values_per_patch * sum(h * w for h, w in grids)))

    def written() -> None:
        with tempfile.NamedTemporaryFile(buffering=0) as file:
            done = 0
            while done < len(rows):
                done += file.write(rows[done:])
            os.fsync(file.fileno())

    def scan() -> None:
        for p in pictures:
            read_header(io.BytesIO(p.data), limits=LIMITS)

    seconds = np.array(
        [[timed(side) for side in (ours, theirs, bound, load, scan, written)] for _ in range(rounds)]
    )
    own_s, baseline_s, bound_s, load_s, scan_s, written_s = np.median(seconds, axis=0).tolist()
    ratios = np.median(seconds / seconds[:, :1], axis=0).tolist()
    return {
        "name": name,
        "pictures": len(pictures),
        "merge": geometry.merge,
        "cap": geometry.max_patches_per_image,
        "images_per_s": len(pictures) / own_s,
        "baseline_images_per_s": len(pictures) / baseline_s,
        "bound_images_per_s": len(pictures) / bound_s,
        "ratio": ratios[1],
        "of_bound": ratios[2],
        "load_of_bound": float(np.median(seconds[:, 2] / seconds[:, 3])),
        "scan_ratio": own_s / scan_s,
        "shard_ms": (own_s - load_s) / len(pictures) * 1000,
        "written_ms": written_s / len(pictures) * 1000,
    }


def grids_of(pictures: Sequence[Picture], geometry: Geometry) -> list[tuple[int, int]]:
    sizes_n2 = np.array([(p.height, p.width) for p in pictures])
    return [(h, w) for h, w in resize_grid(sizes_n2[:, 0], sizes_n2[:, 1], geometry).tolist()]


def write_shard(
    path: Path,
    pictures: Sequence[Picture],
    grids: Sequence[tuple[int, int]],
    geometry: Geometry,
    tokenizer: TextTokenizer,
) -> None:
    """One pack of all pictures, each on a vision row of its own."""
    texts = tokenizer.encode([p.caption for p in pictures])
    tokens_S = np.concatenate([np.asarray(text, np.int32) for text in texts])
    images = np.zeros(len(pictures), IMAGE_DTYPE)
    images["row"] = np.arange(len(pictures))
    images["t"], (images["h"], images["w"]) = 1, np.array(grids).T
    patches = images["h"].astype(np.int64) * images["w"]
    images["offset"] = row_offsets(images["row"], patches)
    images["nbytes"] = patches * geometry.values_per_patch
    writer = ShardWriter(path, len(tokens_S), "")
    patches_XP = writer.room(int(images["nbytes"].sum())).reshape(-1, geometry.values_per_patch)
    begin = 0
    for p, grid, count in zip(pictures, grids, patches.tolist(), strict=True):
        frame = load_one(p, grid, geometry, CONFIG)
        write_patches(frame[None], geometry, patches_XP[begin : begin + count])
        begin += count
    starts = np.cumsum([0] + [len(text) for text in texts]).tolist()
    documents = [Document(starts[i], len(text), "benchmark", str(i), 0) for i, text in enumerate(texts)]
    positions_S = np.arange(len(tokens_S), dtype=np.int32)
    writer.append(Pack(tokens_S, tokens_S, positions_S, patches_XP, images, 0), documents)
    writer.close()


def load_one(
    p: Picture, grid: tuple[int, int], geometry: Geometry, config: ImageConfig
) -> npt.NDArray[np.uint8]:
    size = (p.height, p.width)
    return load_image(p.data, size=size, grid=grid, geometry=geometry, limits=LIMITS, config=config)


def baseline_patches(data: bytes, h: int, w: int, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [cap, P] and the coordinates of every patch, int64 [cap, 3], -1 where there is padding."""
    p, cap = geometry.patch_size, geometry.max_patches_per_image
    picture = Image.open(io.BytesIO(data)).convert("RGB").resize((w * p, h * p))  # Pillow's default: bicubic
    pixels = (np.array(picture) / 255.0 - np.array(geometry.mean)) / np.array(geometry.std)
    patches = rearrange(torch.from_numpy(pixels).float(), "(h ph) (w pw) c -> (h w) (ph pw c)", ph=p, pw=p)
    grid = torch.stack(torch.meshgrid(torch.arange(1), torch.arange(h), torch.arange(w), indexing="ij"))
    grid = rearrange(grid, "coords t h w -> (t h w) coords")
    missing = cap - len(patches)
    patches = torch.cat([patches, torch.zeros(missing, patches.shape[1])])
    return patches, torch.cat([grid, torch.full((missing, 3), -1)])


def profile_cost(pictures: Sequence[Picture], merge: int, cap: int, rounds: int) -> dict[str, Any]:
    geometry = Geometry(merge=merge, max_patches_per_image=cap)
    found = [p for p in pictures if profile_of(Image.open(io.BytesIO(p.data))) is not None]
    grids = grids_of(found, geometry)

    def load(config: ImageConfig) -> None:
        for p, grid in zip(found, grids, strict=True):
            load_one(p, grid, geometry, config)

    configs = (ImageConfig(convert_profiles=True), ImageConfig(convert_profiles=False))
    seconds = [[timed(partial(load, config)) for config in configs] for _ in range(rounds)]
    with_ms, without_ms = (np.median(seconds, axis=0) / max(1, len(found)) * 1000).tolist()
    counts = {"pictures": len(found), "of": len(pictures), "cap": cap}
    return {**counts, "with_ms": with_ms, "without_ms": without_ms}


def scaling_error(groups: Sequence[Sequence[Picture]], margin: float) -> dict[str, Any]:
    """PSNR of resized pictures, scaled decode against full decode, of those that this margin scales at either cap."""
    pictures = [p for group in groups for p in group]
    before, decode.MARGIN = decode.MARGIN, margin
    found: list[float] = []
    for merge, cap in CAPS:
        geometry = Geometry(merge=merge, max_patches_per_image=cap)
        for p, grid in zip(pictures, grids_of(pictures, geometry), strict=True):
            target = (grid[0] * geometry.patch_size, grid[1] * geometry.patch_size)
            if decode.scale_of((p.height, p.width), target) == 1:
                continue
            configs = (ImageConfig(dct_scaling=True), ImageConfig(dct_scaling=False))
            scaled, full = (load_one(p, grid, geometry, config) for config in configs)
            square = np.mean((scaled.astype(np.float64) - full) ** 2)
            found.append(10 * np.log10(255**2 / max(square, 1e-10)))
    decode.MARGIN = before
    return {
        "margin": margin,
        "pictures": len(found),
        "median": float(np.median(found)),
        "p5": float(np.percentile(found, 5)),
        "least": min(found),
    }


def timed(function: Callable[[], None]) -> float:
    begin = time.process_time()
    function()
    return time.process_time() - begin


if __name__ == "__main__":
    main()
