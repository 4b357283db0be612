"""Pictures per second that one core brings to a batch: this loader, and loaders that decode while training.

    python -m pip install --no-deps --target RIVALS mosaicml-streaming webdataset datasets catalogue brotli \
        python-snappy cramjam zstd braceexpand dill multiprocess pandas
    PYTHONPATH=RIVALS python benchmarks/loader_rivals.py ../shared/data/cc12m/cc12m-train-0000.tar \
        ../shared/data/photos/photos-jpeg-000000.tar

The pictures, repeated to --pictures, are stored as each side stores them: finished packs here, JPEG files in MDS
shards (MosaicML Streaming), in a tar (WebDataset) and in Arrow files (Hugging Face datasets) there. Each then brings
all of them to pixel_values [N, L, P] once, in the same rows: for the others that is decode, resize, patchify and
collate, once by Pillow and once by this project's own decoder, which is faster; grids and places are given to them.

Figures are of processor time, all threads of the process counted, best of --rounds: per core, and good beside other
work. No shuffling and no worker processes: both cost the others more. The page cache is warm.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import itertools
import json
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from images import CONFIG, Picture, grids_of, load_one, read_tar
from packs import TOKENS
from PIL import Image

from shared.dataset import describe_contract, fingerprint_of, open_dataset
from shared.files import write_json
from shared.geometry import Budget, Geometry, write_patches
from shared.schema import IGNORE_LABEL, IMAGE_DTYPE, Document, Pack
from shared.shard_writer import ShardWriter
from trainer.data.loader import Loader
from trainer.data.mixture import single

N, L = 9, 2048
CAPS = [(1, 256), (2, 1024)]  # merge, patches per image
Load = Callable[[int, bytes], npt.NDArray[np.uint8]]
"""(number, JPEG) -> uint8 [h*p, w*p, 3]"""
Place = tuple[int, int, int]
"""Batch, row, first patch."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tars", type=Path, nargs="+", help="JPEGs, as webdataset")
    parser.add_argument("--pictures", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [picture for tar in options.tars for picture in read_tar(tar)]
    pictures = list(itertools.islice(itertools.cycle(found), options.pictures))
    print(f"{len(pictures)} pictures, {len(found)} different ones; pictures per second of processor time")
    print("cap    loader                          Pillow   own decoder   ours is faster by")
    rows = [row for merge, cap in CAPS for row in compare(pictures, merge, cap, options.rounds)]
    if options.json:
        print(json.dumps({"pictures": len(pictures), "rows": rows}))


def compare(pictures: Sequence[Picture], merge: int, cap: int, rounds: int) -> Iterator[dict[str, Any]]:
    geometry = Geometry(patch_size=16, merge=merge, max_patches_per_image=cap)
    grids = grids_of(pictures, geometry)
    places = lay_out(grids)
    loads: dict[str, Load] = {
        "pillow": partial(load_by_pillow, grids, geometry),
        "own": lambda n, data: load_one(pictures[n], grids[n], geometry, CONFIG),
    }
    with tempfile.TemporaryDirectory() as directory:
        path = write_packs(Path(directory) / "ours", pictures, grids, places, geometry)
        ours = max(our_speed(path) for _ in range(rounds))
        print(f"{cap:4}   this project {'':32} {ours:9,.0f}")
        yield {"cap": cap, "loader": "this project", "images_per_s": ours}
        for name, (write, read) in RIVALS.items():
            folder = Path(directory) / name.replace(" ", "-")
            folder.mkdir()
            write(folder, pictures)
            speeds = {
                how: max(speed_of(read, folder, load, grids, places, geometry) for _ in range(rounds))
                for how, load in loads.items()
            }
            print(
                f"{cap:4}   {name:28} {speeds['pillow']:9,.0f} {speeds['own']:13,.0f} "
                f"{ours / speeds['pillow']:9,.0f} x, {ours / speeds['own']:4,.0f} x"
            )
            yield {
                "cap": cap,
                "loader": name,
                **{f"{how}_images_per_s": speed for how, speed in speeds.items()},
            }


def lay_out(grids: Sequence[tuple[int, int]]) -> list[Place]:
    """Pictures in order, row after row, batch after batch."""
    places: list[Place] = []
    row, offset = 0, 0
    for h, w in grids:
        if offset + h * w > L:
            row, offset = row + 1, 0
        places.append((row // N, row % N, offset))
        offset += h * w
    return places


# Ours


def write_packs(
    path: Path,
    pictures: Sequence[Picture],
    grids: Sequence[tuple[int, int]],
    places: Sequence[Place],
    geometry: Geometry,
) -> Path:
    S = N * L // geometry.patches_per_token + 512  # room for all visual tokens and their marks
    contract = describe_contract(Budget(S=S, N=N, L=L), geometry, TOKENS, "raw")
    (path / "shards").mkdir(parents=True)
    writer = ShardWriter(path / "shards" / "train-000000.parquet", S, fingerprint_of(contract))
    for _, group in itertools.groupby(range(len(places)), key=lambda number: places[number][0]):
        numbers = list(group)
        images, start = np.zeros(len(numbers), IMAGE_DTYPE), 1
        blobs: list[npt.NDArray[np.uint8]] = []
        for place, number in enumerate(numbers):
            (h, w), (_, row, offset) = grids[number], places[number]
            blobs.append(np.empty((h * w, geometry.values_per_patch), np.uint8))
            write_patches(load_one(pictures[number], (h, w), geometry, CONFIG)[None], geometry, blobs[-1])
            images[place] = (start, row, offset, 1, h, w, blobs[-1].nbytes)
            start += h * w // geometry.patches_per_token + 2
        tokens_S, positions_S = np.full(S, 7, np.int32), np.arange(S, dtype=np.int32)
        labels_S = np.full(S, IGNORE_LABEL, np.int32)
        pack = Pack(tokens_S, labels_S, positions_S, np.concatenate(blobs), images, cost=1)
        writer.append(pack, [Document(0, S, "made", "0", 0)])
    writer.close()
    shard = {"name": "train-000000.parquet", "split": "train", "packs": writer.num_packs, "bytes": 0}
    manifest = {**contract, "fingerprint": fingerprint_of(contract), "account": {"made": {}}}
    write_json(path / "dataset.json", {**manifest, "shards": [{**shard, "checksum": ""}]})
    return path


def our_speed(path: Path) -> float:
    data = single(open_dataset(path))
    loader = Loader(
        data,
        split="train",
        seed=0,
        packs_per_microbatch=1,
        accumulation=1,
        dp_rank=0,
        dp_size=1,
        device=torch.device("cpu"),
        start_step=0,
        decode_threads=1,
    )
    steps = iter(loader)
    for _ in range(4):  # what was loaded before the clock is started
        next(steps)
    begin, count = time.process_time(), 0
    for step in itertools.islice(steps, 3 * data.num_packs("train")):
        count += step.counts.images
    seconds = time.process_time() - begin
    loader.close()
    return count / seconds


# Theirs


def speed_of(
    read: Callable[[Path], Iterable[bytes]],
    folder: Path,
    load: Load,
    grids: Sequence[tuple[int, int]],
    places: Sequence[Place],
    geometry: Geometry,
) -> float:
    begin = time.process_time()
    batch, pixels_NLP = -1, np.empty(0, np.uint8)
    for number, data in enumerate(read(folder)):
        (h, w), (new, row, offset) = grids[number], places[number]
        if new != batch:
            batch, pixels_NLP = new, np.zeros((N, L, geometry.values_per_patch), np.uint8)
        write_patches(load(number, data)[None], geometry, pixels_NLP[row, offset : offset + h * w])
    return len(places) / (time.process_time() - begin)


def load_by_pillow(
    grids: Sequence[tuple[int, int]], geometry: Geometry, number: int, data: bytes
) -> npt.NDArray[np.uint8]:
    h, w = grids[number]
    size = (w * geometry.patch_size, h * geometry.patch_size)
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize(size, Image.Resampling.BILINEAR))


@cache
def import_streaming() -> types.ModuleType:
    """The base of MosaicML Streaming. The package itself imports torchvision, for data sets not used here."""
    spec = importlib.util.find_spec("streaming")
    assert spec is not None and spec.submodule_search_locations is not None, "install mosaicml-streaming"
    package = types.ModuleType("streaming")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["streaming"] = package
    return importlib.import_module("streaming.base")


def write_mds(folder: Path, pictures: Sequence[Picture]) -> None:
    with import_streaming().MDSWriter(out=str(folder), columns={"jpg": "bytes", "txt": "str"}) as writer:
        for picture in pictures:
            writer.write({"jpg": picture.data, "txt": picture.caption})


def read_mds(folder: Path) -> Iterator[bytes]:
    dataset = import_streaming().StreamingDataset(local=str(folder), shuffle=False, batch_size=1)
    return (sample["jpg"] for sample in dataset)


def write_tar(folder: Path, pictures: Sequence[Picture]) -> None:
    import webdataset  # pyright: ignore[reportMissingImports]  # optional

    with webdataset.TarWriter(str(folder / "pictures.tar")) as writer:
        for number, picture in enumerate(pictures):
            writer.write({"__key__": f"{number:09}", "jpg": picture.data, "txt": picture.caption})


def read_webdataset(folder: Path) -> Iterator[bytes]:
    import webdataset  # pyright: ignore[reportMissingImports]  # optional

    samples = webdataset.WebDataset(str(folder / "pictures.tar"), shardshuffle=False)
    return (sample["jpg"] for sample in samples)


def write_arrow(folder: Path, pictures: Sequence[Picture]) -> None:
    import datasets  # pyright: ignore[reportMissingImports]  # optional

    datasets.disable_progress_bars()
    columns = {"jpg": [p.data for p in pictures], "txt": [p.caption for p in pictures]}
    features = datasets.Features({"jpg": datasets.Value("binary"), "txt": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(folder / "table"))


def read_arrow(folder: Path) -> Iterator[bytes]:
    import datasets  # pyright: ignore[reportMissingImports]  # optional

    return (row["jpg"] for row in datasets.load_from_disk(str(folder / "table")))


RIVALS: dict[str, tuple[Callable[[Path, Sequence[Picture]], None], Callable[[Path], Iterable[bytes]]]] = {
    "MosaicML Streaming": (write_mds, read_mds),
    "WebDataset": (write_tar, read_webdataset),
    "Hugging Face datasets": (write_arrow, read_arrow),
}


if __name__ == "__main__":
    main()
