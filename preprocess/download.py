"""Copy a finished data set from a store: all of it, to train on, or a shard at a time, to look at it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from preprocess.progress import track
from shared import remote
from shared.dataset import MANIFEST, DataSet, ShardEntry, open_dataset
from shared.errors import UserError
from shared.files import (
    atomic_path,
    exists,
    file_checksum,
    file_size,
    list_tree,
    lock_directory,
    open_file,
    remove,
    remove_temporaries,
)
from shared.remote import is_remote, shown
from shared.tokens import tokenizer_files

# What belongs to a data set beside its shards and dataset.json; index/ and plan/ are of the job that made it.
SIDE_FILES = ("rejects.parquet", "config.toml", "tokenizer/", "report/")


def download_dataset(source: Path, target: Path) -> dict[str, int]:
    """Make `target` the data set that `source` is; counts of shards copied, kept and of bytes copied.

    Shards that are there with the right checksum stay; dataset.json comes last; that of another data set goes first.

    Raises:
        UserError: a data set cannot be opened, or what arrived is not what its dataset.json says.
    """
    with _manifest_only(source) as dataset, lock_directory(target, "downloading"):
        remove_temporaries(target)
        # While its shards are replaced, the manifest of another data set would speak for a mixture of both.
        manifest = target / MANIFEST
        if manifest.exists() and manifest.read_bytes() != (dataset.path / MANIFEST).read_bytes():
            manifest.unlink()
        counts = {"shards": 0, "kept": 0, "bytes": 0}
        copies = (_copy_shard(source, target, shard) for shard in dataset.shards)
        for shard, copied in zip(
            dataset.shards, track(copies, label="download", total=len(dataset.shards), done=0), strict=True
        ):
            counts["shards" if copied else "kept"] += 1
            counts["bytes"] += shard.bytes if copied else 0
        _copy_side_files(source, target)
        _copy(source / MANIFEST, target / MANIFEST)
    return counts


@contextmanager
def open_anywhere(path: Path) -> Generator[DataSet, None, None]:
    """A data set to look at. Of one in a store a temporary copy is made, one shard at a time.

    Raises:
        UserError: as `open_dataset`.
    """
    if not is_remote(path):
        yield open_dataset(path)
        return
    with tempfile.TemporaryDirectory(prefix="parquetry-") as name:
        copy = Path(name)
        try:
            _copy_side_files(path, copy)
            _copy_manifest(path, copy)

            def fetch(shard: ShardEntry) -> None:
                shutil.rmtree(copy / "shards", ignore_errors=True)
                if exists(path / "shards" / _checked(shard.name)):
                    _copy(path / "shards" / shard.name, copy / "shards" / shard.name)

            yield open_dataset(copy, fetch)
        except UserError as error:
            raise UserError(str(error).replace(name, shown(path))) from None


@contextmanager
def _manifest_only(source: Path) -> Generator[DataSet, None, None]:
    """What dataset.json says, checked as when a data set is opened."""
    with tempfile.TemporaryDirectory(prefix="parquetry-") as name:
        _copy_manifest(source, Path(name))
        try:
            # No shard of it is opened, however many there are.
            dataset = open_dataset(Path(name), lambda shard: None)
        except UserError as error:
            raise UserError(str(error).replace(name, shown(source))) from None
        yield dataset


def _copy_manifest(source: Path, target: Path) -> None:
    if not exists(source / MANIFEST):
        raise UserError(
            f"data set {shown(source)}: no {MANIFEST} there, so it is not complete, or no data set; correct the path, "
            f"or run `python -m preprocess run` to its end"
        )
    _copy(source / MANIFEST, target / MANIFEST)


def _copy_shard(source: Path, target: Path, shard: ShardEntry) -> bool:
    """Whether it had to be copied."""
    path = target / "shards" / _checked(shard.name)
    if file_size(path) == shard.bytes and file_checksum(path) == shard.checksum:
        return False
    with atomic_path(path) as temporary:
        _fetch(source / "shards" / shard.name, temporary)
        if (found := file_checksum(temporary)) != shard.checksum:
            raise UserError(
                f"{shown(source)}: {shard.name} has checksum {found}, {MANIFEST} says {shard.checksum}; it is damaged "
                f"or of another run, make it again"
            )
    return True


def _checked(name: str) -> str:
    """A name of dataset.json that stays inside its directory."""
    if PurePosixPath(name).name != name:
        raise UserError(
            f"{MANIFEST}: {name!r} is no name of a shard; it was edited, build the data set again"
        )
    return name


def _copy_side_files(source: Path, target: Path) -> None:
    names = [
        name
        for name in list_tree(source)
        if name.startswith(SIDE_FILES) and ".." not in PurePosixPath(name).parts
    ]
    for name in names:
        _copy(source / name, target / name)
    # A chat template of the data set that was there before would make it another tokenizer.
    for file in tokenizer_files(target / "tokenizer"):
        if f"tokenizer/{file}" not in names:
            remove(target / "tokenizer" / file)


def _copy(source: Path, target: Path) -> None:
    with atomic_path(target) as temporary:
        _fetch(source, temporary)


def _fetch(source: Path, file: Path) -> None:
    if is_remote(source):
        with open(file, "wb") as target:
            remote.download(str(source), target.fileno())
    else:
        with open_file(source) as content, open(file, "wb") as target:
            shutil.copyfileobj(content, target)
