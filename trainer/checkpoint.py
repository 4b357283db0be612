"""Checkpoints that are complete or absent, written while training goes on.

    checkpoints/step_00000100.tmp/   being written, or left by a killed run: removed at the next start
    checkpoints/step_00000100/       complete:
        __RANK_0.distcp              what this rank wrote of the model and the optimizer (trainer.checkpoint_state)
        .metadata                    where in them each tensor lies; torch's own
        state.json                   the step and what else the run says of it
        checksums.json               xxh3 of each of these files

    train  | step 100 | copy | step 101 | step 102 | ...                    training waits for the copy only,
    writer                   | write, flush | checksums | rename | prune |  into (pinned) memory of the host

A checkpoint is never written over another one (torch would then mix two steps after a kill without noticing): it is
written beside, flushed, and renamed when every rank is done. The writer has a process group of its own, on the host,
so that nothing it sends can come between what training sends. Parameters are named, not numbered, so a checkpoint
loads under any layout.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import STORAGE_TYPES
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from shared.config import require_at_least
from shared.errors import UserError
from shared.files import file_checksum, write_json
from trainer.checkpoint_errors import failures_named
from trainer.checkpoint_state import EXTRA, MODEL, OPTIMIZER, difference, named_tensors, start_moments
from trainer.parallel.mesh import World

NAME = re.compile(r"step_(\d{8})")
STATE, CHECKSUMS, METADATA = "state.json", "checksums.json", ".metadata"
T = TypeVar("T")

# Without a process group torch warns that it assumes one process; that is what is meant. Once and for all: what
# `catch_warnings` restores is shared by all threads.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    every: int = 500
    """Steps between checkpoints; the last step always has one."""
    keep: int = 2
    """Newest checkpoints to keep."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "every", "keep")


def complete_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in directory.glob("step_*") if NAME.fullmatch(path.name))


def remove_incomplete(directory: Path) -> None:
    """Remove what killed runs left. Only rank 0 calls this, and only before anybody writes."""
    for path in directory.glob("*.tmp"):
        shutil.rmtree(path)


class Checkpointer:
    """Writes the checkpoints of a run, one at a time, in a thread. Every rank has one and calls it alike.

    As a context manager it ends only when what is being written is complete, also when the run has failed.
    """

    def __init__(self, directory: Path, world: World, *, keep: int) -> None:
        self.directory, self.world, self.keep = directory, world, keep
        self.group = None if world.mesh is None else cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[None] | None = None
        # It keeps the memory for its copies, so only the first save of a run pays for pinning it.
        cuda = world.device.type == "cuda"
        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda,
                use_non_blocking_copy=cuda,
                use_shared_memory=False,
                use_async_staging=False,
            )
        )

    def save(
        self,
        parts: Sequence[nn.Module],
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        extra: Mapping[str, Tensor] | None = None,
    ) -> float:
        """Begin the checkpoint of `state["step"]` finished steps; returns the seconds that training waited.

        When it returns, everything is copied and may change. `state` is a small JSON value, `extra` are small
        tensors, both the same on all ranks.

        Raises:
            UserError: the checkpoint before could not be written.
        """
        start = time.perf_counter()
        self.finish()
        start_moments(optimizer)
        # A dict and no Future, because staging is not asynchronous.
        staged = cast(dict[str, Tensor], self.stager.stage(named_tensors(parts, optimizer, extra or {})))
        self.writing = self.thread.submit(self._write, staged, json.dumps(state), state["step"])
        return time.perf_counter() - start

    @property
    def failed(self) -> bool:
        """Whether `finish` would raise now. Ranks learn of it at different times: let them agree first."""
        return self.writing is not None and self.writing.done() and self.writing.exception() is not None

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is complete.

        Raises:
            UserError: on every rank: the disk is full or cannot be written to; complete checkpoints are as they were.
        """
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.finish()
        except Exception as failure:
            if kind is None:
                raise
            logging.getLogger(__name__).warning("%s", failure)  # what ended the run is the news
        finally:
            self.thread.shutdown()
            self.stager.close()
            if self.group is not None:
                dist.destroy_process_group(self.group)

    def _write(self, staged: dict[str, Tensor], state: str, step: int) -> None:
        """What the thread does. Ranks meet for torch's plan and results, the checksums and the rename."""
        final = self.directory / f"step_{step:08d}"
        temporary = final.with_suffix(".tmp")
        with failures_named(final, "written"):
            save(staged, checkpoint_id=temporary, process_group=self.group, no_dist=self.group is None)
            own = agreed(self.world, lambda: self._own_checksums(temporary, state), self.group)
            all_ranks = gathered(self.world, own, self.group)
            checksums = {name: value for each in all_ranks for name, value in each.items()}
            agreed(self.world, lambda: self._complete(temporary, final, checksums), self.group)

    def _own_checksums(self, temporary: Path, state: str) -> dict[str, str]:
        files = list(temporary.glob(f"__{self.world.rank}_*"))
        if self.world.is_main:
            write_json(temporary / STATE, json.loads(state))
            files += [temporary / STATE, temporary / METADATA]
        return {file.name: file_checksum(file) for file in files}

    def _complete(self, temporary: Path, final: Path, checksums: dict[str, str]) -> None:
        if not self.world.is_main:
            return
        write_json(temporary / CHECKSUMS, checksums)
        _flush(temporary)
        os.rename(temporary, final)
        _flush(self.directory)
        for old in complete_checkpoints(self.directory)[: -self.keep]:
            # Renamed first: a removal that is cut short must not look complete.
            old.rename(old.with_suffix(".tmp"))
            shutil.rmtree(old.with_suffix(".tmp"))


def load_checkpoint(
    path: Path,
    parts: Sequence[nn.Module],
    optimizer: torch.optim.Optimizer | None,
    world: World,
    extra: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Load into the model, and into optimizer and `extra` if given, under any layout; returns the saved state.

    Raises:
        UserError: on every rank: the checkpoint is damaged, cannot be read, or holds other parameters or shapes.
    """
    if optimizer is not None:
        start_moments(optimizer)
    tensors = named_tensors(parts, optimizer, extra or {})
    reader = FileSystemReader(path)

    def examine() -> tuple[dict[str, Any], dict[str, STORAGE_TYPES]]:
        with failures_named(path, "read"):
            verify_files(path, world.rank, world.size)
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            return state, reader.read_metadata().state_dict_metadata

    state, saved = agreed(world, examine)
    kinds = (MODEL,) if optimizer is None else (MODEL, OPTIMIZER, EXTRA)
    asked = {name: entry for name, entry in saved.items() if name.startswith(kinds)}
    held = world.sum_on_host([name in tensors for name in sorted(asked)])

    def compare() -> None:
        if what := difference(tensors, asked, held):
            raise UserError(f"checkpoint {path} {what}; it belongs to another model config")

    agreed(world, compare)
    with failures_named(path, "read"):
        load(tensors, storage_reader=reader, no_dist=world.mesh is None)
    return state


def verify_files(path: Path, rank: int = 0, size: int = 1) -> None:
    """Read every file once, shared out to `size` ranks: torch would load a flipped bit without noticing."""
    checksums = json.loads((path / CHECKSUMS).read_text(encoding="utf-8"))
    for name in sorted(checksums)[rank::size]:
        if (found := file_checksum(path / name)) != checksums[name]:
            raise ValueError(f"{name} has checksum {found}, was written with {checksums[name]}")


def agreed(world: World, action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """What `action` returns on this rank, when it has succeeded on all.

    Raises:
        Exception: it failed on some rank; on all, so that none waits for one that has ended.
    """
    value: T | None = None
    failure: Exception | None = None
    try:
        value = action()
    except Exception as error:
        failure = error
    sent = (
        failure
        if failure is None or isinstance(failure, (UserError, OSError))
        else RuntimeError(repr(failure))
    )
    failures = gathered(world, sent, group)
    if failure is not None:
        raise failure
    for other in failures:
        if other is not None:
            raise other
    return cast(T, value)


def gathered(world: World, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The `value` of every rank, by rank."""
    if world.mesh is None:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value, group=group)
    return values


def _flush(directory: Path) -> None:
    """Flush the entries of a directory to disk. Its files were flushed by whoever wrote them."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
