"""`dataset.json`: what a finished data set is, and opening one.

    DATASET/
      dataset.json     written last, by rename: it alone says that the data set is complete
      shards/          finished packs, one Parquet file per shard
      index/ plan/     what was read, and which piece went to which pack
      tokenizer/       the tokenizer files, copied
      rejects.parquet  every sample, or part of one, that is not trained on, with its reason
      report/          statistics

The fingerprint is a hash of everything that two stages, or two data sets trained on together, must agree on.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.codecs import CODECS, ImageDecoder, image_decoder
from shared.errors import UserError, closest
from shared.files import allow_open_files, canonical_json, read_json, sha256
from shared.geometry import PATCH_ORDER, Budget, Geometry
from shared.remote import is_remote, shown
from shared.schema import FORMAT_VERSION, Document, Pack
from shared.shard_reader import ShardReader
from shared.tokens import TokenIds

MANIFEST = "dataset.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardEntry:
    """One line of `shards` in dataset.json; `checksum` is the xxh3 of the whole file, in hex."""

    name: str
    split: str
    packs: int
    bytes: int
    checksum: str


def describe_contract(budget: Budget, geometry: Geometry, tokens: TokenIds, codec: str) -> dict[str, Any]:
    """The part of dataset.json that the fingerprint covers."""
    return {
        "format_version": FORMAT_VERSION,
        "budget": dataclasses.asdict(budget),
        "geometry": {
            **dataclasses.asdict(geometry),
            "patch_order": PATCH_ORDER,
            "mean": list(geometry.mean),
            "std": list(geometry.std),
        },
        "tokens": dataclasses.asdict(tokens),
        "codec": codec,
    }


def fingerprint_of(contract: dict[str, Any]) -> str:
    return sha256(canonical_json(contract))


class DataSet:
    """A finished data set. Cheap to open: shards are mapped on first use.

    A pack of a split is numbered 0 .. num_packs(split) - 1 across that split's shards, in manifest order.
    """

    def __init__(
        self, path: Path, manifest: dict[str, Any], fetch: Callable[[ShardEntry], None] | None = None
    ) -> None:
        self.path, self._fetch = path, fetch
        self.manifest = manifest
        try:
            self.fingerprint: str = manifest["fingerprint"]
            self.budget = Budget(**manifest["budget"])
            geometry: dict[str, Any] = {**manifest["geometry"]}
            self.patch_order: str = geometry.pop("patch_order")
            for name in ("mean", "std"):
                geometry[name] = tuple(geometry[name])
            self.geometry = Geometry(**geometry)
            self.tokens = TokenIds(**manifest["tokens"])
            self.codec: str = manifest["codec"]
            self.shards = [ShardEntry(**entry) for entry in manifest["shards"]]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"data set {path}: {MANIFEST} is not valid: {error!r}; build it again") from None
        self._readers: dict[str, ShardReader] = {}

    @cached_property
    def identity(self) -> str:
        """Hash of the content: the fingerprint and every shard's checksum, in order."""
        return sha256(canonical_json([self.fingerprint, [dataclasses.asdict(s) for s in self.shards]]))

    @cached_property
    def _decoder(self) -> ImageDecoder | None:
        return image_decoder(self.codec, self.geometry)

    @property
    def splits(self) -> list[str]:
        return sorted({shard.split for shard in self.shards})

    def num_packs(self, split: str) -> int:
        ends, _ = self._split(split)
        return ends[-1] if ends else 0

    def locate(self, split: str, index: int) -> tuple[ShardReader, int]:
        """Shard and row of a split's pack `index`."""
        ends, shards = self._split(split)
        place = bisect.bisect_right(ends, index)
        if index < 0 or place >= len(shards):
            raise IndexError(f"pack {index} of {self.num_packs(split)} in split {split!r}")
        return self.reader(shards[place]), index - (ends[place] - shards[place].packs)

    def pack(self, split: str, index: int) -> Pack:
        reader, row = self.locate(split, index)
        return reader.pack(row)

    def documents(self, split: str, index: int) -> list[Document]:
        reader, row = self.locate(split, index)
        return reader.documents(row)

    @cached_property
    def sources(self) -> list[str]:
        """Names of all sources, sorted: what the numbers of `document_spans` mean."""
        account = self.manifest.get("account")
        if not isinstance(account, dict):
            raise UserError(f"data set {self.path}: {MANIFEST} has no account of its sources; build it again")
        return sorted(account)

    def document_spans(self, split: str, index: int) -> npt.NDArray[Any]:
        """SPAN_DTYPE [documents] of one pack; `source` is a number in `sources`."""
        reader, row = self.locate(split, index)
        spans = reader.document_spans(row).copy()
        spans["source"] = self._source_numbers(reader)[spans["source"]]
        return spans

    def costs(self, split: str, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Modelled FLOPs of the packs `indices` of a split."""
        located = (self.locate(split, int(index)) for index in indices)
        return np.array([reader.costs[row] for reader, row in located], np.int64)

    def reader(self, shard: ShardEntry) -> ShardReader:
        if shard.name not in self._readers:
            path = self.shard_path(shard)
            reader = ShardReader(path, self.geometry.values_per_patch, self._decoder)
            if reader.fingerprint != self.fingerprint or len(reader) != shard.packs:
                raise UserError(
                    f"shard {path}: belongs to another data set (fingerprint {reader.fingerprint[:12]}, "
                    f"{len(reader)} packs; expected {self.fingerprint[:12]}, {shard.packs} packs); copy it again"
                )
            self._readers[shard.name] = reader
        return self._readers[shard.name]

    def shard_path(self, shard: ShardEntry) -> Path:
        """The file of a shard. Where shards are fetched, it takes the place of the one before."""
        path = self.path / "shards" / shard.name
        if self._fetch is not None and not path.exists():
            self._readers.clear()
            self._fetch(shard)
        return path

    def _source_numbers(self, reader: ShardReader) -> npt.NDArray[np.int32]:
        """Number in `sources` of each of a shard's sources."""
        unknown = sorted(set(reader.sources) - set(self.sources))
        if unknown:
            raise UserError(
                f"shard {reader.path}: holds documents of source {unknown[0]!r}, the account in {MANIFEST} has "
                f"{', '.join(self.sources)}; copy the data set again"
            )
        return np.array([self.sources.index(name) for name in reader.sources], np.int32)

    def _split(self, split: str) -> tuple[list[int], list[ShardEntry]]:
        if split not in self._by_split:
            raise UserError(f"data set {self.path}: has no split {split!r}; {closest(split, self._by_split)}")
        return self._by_split[split]

    @cached_property
    def _by_split(self) -> dict[str, tuple[list[int], list[ShardEntry]]]:
        """Per split: the running totals of packs, and the shards."""
        groups: dict[str, tuple[list[int], list[ShardEntry]]] = {}
        for shard in self.shards:
            ends, shards = groups.setdefault(shard.split, ([], []))
            ends.append((ends[-1] if ends else 0) + shard.packs)
            shards.append(shard)
        return groups


def open_dataset(path: Path | str, fetch: Callable[[ShardEntry], None] | None = None) -> DataSet:
    """Open a finished data set; `fetch` brings a shard that is not there yet.

    Raises:
        UserError: the directory is missing, not complete, of another format version, or was edited.
    """
    if is_remote(path):
        raise UserError(
            f"data set {shown(path)}: shards are mapped, which takes files of this machine; copy it with "
            f"`python -m preprocess download {shown(path)} DIRECTORY` and name the copy"
        )
    directory = Path(path)
    if not directory.is_dir():
        raise UserError(f"data set {directory}: no such directory; make it with `python -m preprocess run`")
    if not (directory / MANIFEST).is_file():
        raise UserError(
            f"data set {directory}: no {MANIFEST}, so it is not complete; run `python -m preprocess run` with the "
            f"same config again, it goes on where it stopped"
        )
    manifest = read_json(directory / MANIFEST, mend="build the data set again")
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"data set {directory}: format version {version}, this program knows {FORMAT_VERSION}; update parquetry"
        )
    dataset = DataSet(directory, manifest, fetch)
    if fetch is None:  # else one shard is here at a time
        _allow_mapped_shards(directory, len(dataset.shards))
    if dataset.codec not in CODECS or dataset.patch_order != PATCH_ORDER:
        raise UserError(
            f"data set {directory}: codec {dataset.codec!r} and patch order {dataset.patch_order!r} are not known "
            f"here (codecs: {', '.join(CODECS)}); update parquetry"
        )
    contract = describe_contract(dataset.budget, dataset.geometry, dataset.tokens, dataset.codec)
    if fingerprint_of(contract) != dataset.fingerprint:
        raise UserError(
            f"data set {directory}: the fingerprint in {MANIFEST} does not match its contents; it was edited, "
            f"restore it or build the data set again"
        )
    return dataset


def _allow_mapped_shards(directory: Path, num_shards: int) -> None:
    """A mapped shard holds a file descriptor (until Python 3.13)."""
    needed = num_shards + 256
    if (limit := allow_open_files(needed)) is not None:
        raise UserError(
            f"data set {directory}: {num_shards} shards need {needed} open files, the limit is {limit}; raise it "
            f"(ulimit -n), or make larger shards (plan.shard_bytes)"
        )
