"""One core, from encoded pictures to patches: this pipeline beside the one of torchtitan's VLM experiment.

    python benchmarks/images.py ../shared/data/cc12m/cc12m-train-0000.tar

Baseline, rebuilt from its description: Pillow decode, Pillow bicubic resize, normalization in float64, einops
patches, zero padding to the cap. Both sides resize to the same grid. The two run in turn, round by round, so
that the ratio holds when the machine's speed drifts.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from preprocess.config import SourceConfig
from preprocess.images import decode, read_header, resize
from preprocess.samples import RawSample
from preprocess.sources.webdataset import WebDataset
from shared.geometry import Geometry, patchify, resize_grid

CAPS = [(1, 256), (2, 1024)]  # merge, cap


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tars", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pictures = load_pictures(options.tars)
    scan_s = min(timed(lambda: scan(pictures)) for _ in range(options.rounds))
    rows: list[dict[str, Any]] = []
    for merge, cap in CAPS:
        geometry = Geometry(merge=merge, max_patches_per_image=cap)
        grids = [grid_of(data, geometry) for data in pictures]
        ours, theirs = [], []
        for _ in range(options.rounds):
            ours.append(timed(partial(run, pictures, grids, geometry, our_patches)))
            theirs.append(timed(partial(run, pictures, grids, geometry, baseline_patches)))
        rows.append(
            {
                "cap": cap,
                "merge": merge,
                "images_per_s": len(pictures) / float(np.median(ours)),
                "baseline_images_per_s": len(pictures) / float(np.median(theirs)),
                "ratio": float(np.median(np.array(theirs) / np.array(ours))),
                "scan_ratio": float(np.median(ours)) / scan_s,
            }
        )
    print(f"{len(pictures)} pictures, one thread, median of {options.rounds} rounds")
    for row in rows:
        print(
            f"cap {row['cap']:4}: {row['images_per_s']:6.0f} images/s, baseline {row['baseline_images_per_s']:6.0f}, "
            f"ratio {row['ratio']:.2f}; reading headers alone is {row['scan_ratio']:.0f} times faster"
        )
    if options.json:
        print(json.dumps({"pictures": len(pictures), "rows": rows}))


def load_pictures(tars: list[Path]) -> list[bytes]:
    source = WebDataset("benchmark", SourceConfig(paths=tuple(str(path) for path in tars)))
    samples = [entry for path in tars for entry in source.scan(str(path)) if isinstance(entry, RawSample)]
    return [
        segment.content.read()
        for entry in samples
        for segment in entry.segments
        if not isinstance(segment.content, str)
    ]


def grid_of(data: bytes, geometry: Geometry) -> tuple[int, int]:
    header = read_header(io.BytesIO(data), max_pixels=10**9, max_bytes=10**9)
    h, w = resize_grid(np.array([header.height]), np.array([header.width]), geometry)[0].tolist()
    return h, w


def scan(pictures: list[bytes]) -> None:
    for data in pictures:
        read_header(io.BytesIO(data), max_pixels=10**9, max_bytes=10**9)


def our_patches(data: bytes, h: int, w: int, geometry: Geometry) -> None:
    view = patchify(resize(decode(data, max_pixels=10**9), h, w, geometry)[None], geometry)
    out = np.empty((h * w, geometry.values_per_patch), np.uint8)
    out.reshape(view.shape)[...] = view


def baseline_patches(data: bytes, h: int, w: int, geometry: Geometry) -> None:
    p = geometry.patch_size
    picture = Image.open(io.BytesIO(data)).convert("RGB").resize((w * p, h * p))  # Pillow's default: bicubic
    pixels = (np.asarray(picture) / 255.0 - np.array(geometry.mean)) / np.array(geometry.std)
    tensor = torch.from_numpy(pixels).float()
    patches = rearrange(tensor, "(h ph) (w pw) c -> (h w) (ph pw c)", ph=p, pw=p)
    out = torch.zeros(geometry.max_patches_per_image, geometry.values_per_patch)
    out[: len(patches)] = patches


def run(
    pictures: list[bytes],
    grids: list[tuple[int, int]],
    geometry: Geometry,
    function: Callable[[bytes, int, int, Geometry], None],
) -> None:
    for data, (h, w) in zip(pictures, grids, strict=True):
        function(data, h, w, geometry)


def timed(function: Callable[[], None]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
