"""Small inputs for the tests of `preprocess`: pictures, tars, a tokenizer of bytes, and a config for them.

The tokenizer knows no pair of bytes, so a text takes as many tokens as it has UTF-8 bytes: lengths in the
tests can be counted by hand.
"""

from __future__ import annotations

import functools
import io
import os
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from preprocess.budgets import BudgetConfig
from preprocess.config import PlanConfig, PreprocessConfig
from preprocess.sources.webdataset import WebDatasetConfig
from preprocess.synthetic import train_tokenizer
from shared.geometry import Budget, Geometry

# Cells of 8 pixels a side, 2 x 2 patches of 4 pixels: one visual token each.
GEOMETRY = Geometry(patch_size=4, merge=2, max_patches_per_image=16)
BUDGET = Budget(S=64, N=2, L=32)

Members = Iterable[tuple[str, bytes]]


def noise(seed: int, height: int, width: int, channels: int = 3) -> npt.NDArray[np.uint8]:
    """Pixels uint8 [H, W, channels] with nothing in common between neighbours."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def encode(picture: Image.Image | npt.NDArray[np.uint8], kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(file, kind, **options)
    return file.getvalue()


@functools.cache
def png(height: int, width: int, seed: int = 0) -> bytes:
    return encode(noise(seed, height, width))


def write_tar(path: Path, members: Members, format: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def captioned(key: str, picture: bytes, caption: str) -> list[tuple[str, bytes]]:
    """The members of one sample."""
    return [(f"{key}.png", picture), (f"{key}.txt", caption.encode())]


def write_samples(path: Path, samples: Mapping[str, tuple[bytes, str]]) -> Path:
    return write_tar(path, [member for key, sample in samples.items() for member in captioned(key, *sample)])


def mixed_samples(count: int, seed: int = 0, prefix: str = "") -> dict[str, tuple[bytes, str]]:
    """Pictures from under one cell to above the cap, captions of 1 to 30 characters."""
    rng = np.random.default_rng([seed, 1])
    samples: dict[str, tuple[bytes, str]] = {}
    for number in range(count):
        height, width = rng.integers(3, 60, 2).tolist()
        caption = "".join(rng.choice(list("abcdefgh"), int(rng.integers(1, 31))))
        samples[f"{prefix}{number:04d}"] = (png(height, width, number), caption)
    return samples


def byte_tokenizer(directory: Path) -> Path:
    """262 tokens: the bytes, then the special tokens in the order of `SPECIAL_TOKENS`."""
    train_tokenizer([], directory, vocabulary_size=262)
    return directory


def make_config(directory: Path, *paths: Path, **changes: Any) -> PreprocessConfig:
    """A config of one source "web" over `paths`, all of it below `directory`."""
    source = {
        "paths": tuple(map(str, paths)),
        "too_long": "split",
        "max_reject_rate": 1.0,
        **changes.pop("source", {}),
    }
    settings: dict[str, Any] = {
        "output": str(directory / "out"),
        "tokenizer": str(byte_tokenizer(directory / "tokenizer")),
        "sources": {"web": WebDatasetConfig(**source)},
        "budget": BUDGET,
        "geometry": GEOMETRY,
        "executor": "serial",
        "plan": PlanConfig(shard_bytes=8192),
    }
    settings |= changes
    budget = settings["budget"]
    settings["budget"] = BudgetConfig(S=budget.S, N=budget.N, L=budget.L)
    return PreprocessConfig(**settings)


class Reads:
    """The bytes that were read from files by offset, counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at_most: int = 1 << 40) -> None:
        self.bytes = 0
        pread, preadv = os.pread, os.preadv

        def counted(file: int, size: int, offset: int) -> bytes:
            data = pread(file, min(size, at_most), offset)
            self.bytes += len(data)
            return data

        def counted_into(file: int, buffers: list[memoryview], offset: int) -> int:
            self.bytes += (count := preadv(file, buffers, offset))
            return count

        monkeypatch.setattr(os, "pread", counted)
        monkeypatch.setattr(os, "preadv", counted_into)
