"""A second way to the same shards, sharing no code with `preprocess`: slow, plain, and easy to check by eye.

Shards are read with pyarrow, tars with tarfile, text is encoded with the tokenizers library, pictures go
through Pillow and torch, and patches are cut in loops.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps
from tokenizers import Tokenizer

from shared.files import read_json
from shared.geometry import Geometry, resize_grid

Pixels = npt.NDArray[np.uint8]
Segments = list[str | bytes]  # texts and encoded pictures, in document order


def webdataset_samples(*tars: Path, caption: str = ".txt") -> dict[str, Segments]:
    """The captioned pictures of tars without odd members."""
    pictures: dict[str, bytes] = {}
    texts: dict[str, str] = {}
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar:
                key, kind = member.name.rsplit(".", 1)
                file = tar.extractfile(member)
                assert file is not None
                if kind == "txt":
                    texts[key] = file.read().decode().strip()
                elif kind != "json":
                    pictures[key] = file.read()
    return {key: [pictures[key], texts[key]] for key in pictures}


def displayed(data: bytes) -> Pixels:
    """RGB uint8 [H, W, 3] as a viewer shows it."""
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.float64)
        return np.floor(values / 257 + 0.5).astype(np.uint8)[..., None].repeat(3, axis=2)
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture.convert("RGBA"))
        picture = white
    return np.asarray(picture.convert("RGB"))


def resized(pixels: Pixels, height: int, width: int, mode: str) -> Pixels:
    if pixels.shape[:2] == (height, width):
        return pixels
    planes = torch.tensor(pixels.transpose(2, 0, 1).copy())[None]
    return (
        torch.nn.functional.interpolate(planes, size=(height, width), mode=mode, antialias=True)[0]
        .numpy()
        .transpose(1, 2, 0)
    )


def pillow_resized(pixels: Pixels, height: int, width: int, name: str) -> npt.NDArray[np.int64]:
    """Pillow's result, the width first and then the height, as torch does.

    Left to itself, Pillow takes the order that costs less. The first pass rounds, and clips what bicubic overshoots.
    """
    kind = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[name]
    picture = Image.fromarray(pixels).resize((width, pixels.shape[0]), kind).resize((width, height), kind)
    return np.asarray(picture).astype(np.int64)


def patches_of(pixels: Pixels, geometry: Geometry) -> Pixels:
    """uint8 [h * w, P]: cell by cell, inside a cell patch by patch, the picture repeated for every frame."""
    p, m = geometry.patch_size, geometry.merge
    h, w = pixels.shape[0] // p, pixels.shape[1] // p
    rows = [
        np.tile(pixels[y * p : (y + 1) * p, x * p : (x + 1) * p].reshape(-1), geometry.temporal_patch_size)
        for cell_y in range(h // m)
        for cell_x in range(w // m)
        for y in range(cell_y * m, cell_y * m + m)
        for x in range(cell_x * m, cell_x * m + m)
    ]
    return np.stack(rows)


@dataclass
class Expected:
    """One sample as it must arrive: its whole stream, and (first visual token, h, w, patches) of its pictures."""

    tokens: list[int]
    labels: list[int]
    images: list[tuple[int, int, int, Pixels]]


class Reference:
    def __init__(self, dataset: Path) -> None:
        self.path = dataset
        self.manifest: dict[str, Any] = read_json(dataset / "dataset.json")
        fields = {key: value for key, value in self.manifest["geometry"].items() if key != "patch_order"}
        self.geometry = Geometry(**fields)
        self.tokenizer = Tokenizer.from_file(str(dataset / "tokenizer" / "tokenizer.json"))
        self.tokenizer.encode_special_tokens = True
        names = read_json(dataset / "tokenizer" / "tokenizer_config.json")
        special = ("bos_token", "eos_token", "pad_token", "img_token", "boi_token", "eoi_token")
        ids = [self.tokenizer.token_to_id(names[name]) for name in special]
        self.bos, self.eos, self.pad, self.image, self.begin, self.end = ids

    def expect(self, segments: Segments) -> Expected:
        tokens, images = [self.bos], []
        for segment in segments:
            if isinstance(segment, str):
                tokens += self.tokenizer.encode(segment, add_special_tokens=False).ids
                continue
            pixels = displayed(segment)
            h, w = resize_grid(*(np.array([side]) for side in pixels.shape[:2]), self.geometry)[0].tolist()
            size = (h * self.geometry.patch_size, w * self.geometry.patch_size)
            picture = resized(pixels, *size, self.geometry.filter)
            images.append((len(tokens) + 1, h, w, patches_of(picture, self.geometry)))
            tokens += [self.begin, *[self.image] * (h * w // self.geometry.merge**2), self.end]
        tokens.append(self.eos)
        unlearned = {self.image, self.begin, self.end}
        labels = [-100 if following in unlearned else following for following in tokens[1:]] + [-100]
        return Expected(tokens, labels, images)

    def packs(self) -> Iterator[dict[str, Any]]:
        """Every pack of every shard, arrays as numpy."""
        values = self.geometry.temporal_patch_size * self.geometry.patch_size**2 * 3
        for shard in self.manifest["shards"]:
            path = self.path / "shards" / shard["name"]
            for row in pq.read_table(path, page_checksum_verification=True).to_pylist():
                for name in ("tokens", "labels", "positions"):
                    row[name] = np.frombuffer(row[name], "<i4")
                row["patches"] = np.frombuffer(row["patches"], np.uint8).reshape(-1, values)
                yield {**row, "split": shard["split"]}

    def check(self, samples: Mapping[tuple[str, str], Segments]) -> dict[tuple[str, str], dict[int, int]]:
        """Compare every pack with samples by (source, key); return the length of each part found, by sample."""
        expected: dict[tuple[str, str], Expected] = {}
        begins: dict[tuple[str, str], dict[int, int]] = {}
        pieces = []
        for pack in self.packs():
            position = 0
            left = list(self._placed_images(pack))
            for document in pack["documents"]:
                assert document["start"] == position
                position += document["length"]
                here = slice(document["start"], position)
                assert pack["positions"][here].tolist() == list(range(document["length"]))
                own = [image for image in left if here.start <= image[0] < here.stop]
                left = [image for image in left if image not in own]
                name = (document["source"], document["key"])
                parts = begins.setdefault(name, {})
                assert document["part"] not in parts, f"{name}: a part is packed twice"
                parts[document["part"]] = document["length"]
                pieces.append((name, document["part"], here, pack, own))
            assert not left, "an image belongs to no document"
            self._check_padding(pack, position)
        for name, part, here, pack, own in pieces:
            if name not in expected:
                expected[name] = self.expect(samples[name])
            self._check_piece(expected[name], begins[name], part, here, pack, own)
        return begins

    def _placed_images(self, pack: dict[str, Any]) -> Iterator[tuple[int, int, int, bytes]]:
        """(token, h, w, bytes) of the images of a pack, after checking that rows hold them without gaps."""
        used = [0] * self.manifest["budget"]["N"]
        first = 0
        for image in pack["images"]:
            assert image["t"] == 1 and image["offset"] == used[image["row"]]
            count = image["h"] * image["w"]
            used[image["row"]] += count
            assert image["nbytes"] == count * pack["patches"].shape[1]
            yield (
                image["token_start"],
                image["h"],
                image["w"],
                pack["patches"][first : first + count].tobytes(),
            )
            first += count
        assert first == len(pack["patches"])
        assert max(used) <= self.manifest["budget"]["L"]

    def _check_padding(self, pack: dict[str, Any], used: int) -> None:
        room = self.manifest["budget"]["S"] - used
        assert room >= 0
        assert pack["tokens"][used:].tolist() == [self.pad] * room
        assert pack["labels"][used:].tolist() == [-100] * room
        assert pack["positions"][used:].tolist() == list(range(room))

    def _check_piece(
        self,
        expected: Expected,
        lengths: dict[int, int],
        part: int,
        here: slice,
        pack: dict[str, Any],
        own: list[tuple[int, int, int, bytes]],
    ) -> None:
        # Where the part begins in its sample: after the parts before it, or before those behind it.
        if set(range(part)) <= set(lengths):
            begin = sum(lengths[number] for number in range(part))
        else:
            begin = len(expected.tokens) - sum(lengths[n] for n in lengths if n >= part)
        inside = slice(begin, begin + lengths[part])
        assert pack["tokens"][here].tolist() == expected.tokens[inside]
        assert pack["labels"][here].tolist() == expected.labels[inside]
        images = [image for image in expected.images if inside.start <= image[0] < inside.stop]
        placed = [(start - here.start + begin, h, w, patches) for start, h, w, patches in sorted(own)]
        assert placed == [(start, h, w, patches.tobytes()) for start, h, w, patches in images]
