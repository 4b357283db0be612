"""Checkpoints that are complete or absent.

    checkpoints/step_00000100.tmp/   being written, or left by a killed run: removed at the next start
    checkpoints/step_00000100/       complete: model and optimizer in shards, and state.json

A checkpoint is never written over another one (torch would then mix two steps after a kill without noticing):
it is written beside, flushed and renamed. Parameters are named, not numbered, so it loads under any layout.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from shared.config import require_at_least
from shared.errors import UserError
from shared.files import write_json
from trainer.parallel.mesh import World

NAME = re.compile(r"step_(\d{8})")
MODEL, OPTIMIZER = "model.", "optimizer."
# What the content of a file that was cut short or changed raises, in json, pickle and torch; and what torch names in
# a RuntimeError when its zip archive is broken. Its other RuntimeErrors (memory, devices, networks) prove no damage.
DAMAGE = (EOFError, pickle.UnpicklingError, ValueError)
BROKEN_ARCHIVE = ("PytorchStreamReader", "inline_container", "hasRecord")
# One entry per parameter instead of numbered groups: independent of the order and of the layout.
OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


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


def save_checkpoint(
    directory: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    world: World,
    keep: int,
) -> Path:
    """Write the checkpoint of `state["step"]` finished steps and drop all but the newest `keep`.

    Every rank calls it and writes its own part; `state` is a small JSON value, the same on all ranks.

    Raises:
        UserError: the disk is full or cannot be written to; complete checkpoints are as they were.
    """
    final = directory / f"step_{state['step']:08d}"
    if final.exists():
        return final
    temporary = final.with_suffix(".tmp")
    with _failures_named(final, "written"):
        with _expected_alone():
            save(_tensors(model, optimizer), checkpoint_id=temporary, no_dist=world.mesh is None)
        if world.is_main:
            write_json(temporary / "state.json", state)
            _flush(temporary)
            os.rename(temporary, final)
            _flush(directory)
    if world.is_main:
        for old in complete_checkpoints(directory)[:-keep]:
            # Renamed first: a removal that is cut short must not look complete.
            old.rename(old.with_suffix(".tmp"))
            shutil.rmtree(old.with_suffix(".tmp"))
    world.barrier()
    return final


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, world: World
) -> dict[str, Any]:
    """Load into the model, and into the optimizer if given, under any layout; returns the saved state.

    Raises:
        UserError: the checkpoint is damaged, cannot be read, or holds other parameters or shapes; names it, and them.
    """
    tensors = _tensors(model, optimizer)
    reader = FileSystemReader(path)
    with _failures_named(path, "read"):
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        saved = reader.read_metadata().state_dict_metadata
    _check_same(path, tensors, saved, whole=optimizer is not None)
    with _failures_named(path, "read"), _expected_alone():
        load(tensors, storage_reader=reader, no_dist=world.mesh is None)
    set_model_state_dict(model, _part(tensors, MODEL), options=OPTIONS)
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, _part(tensors, OPTIMIZER), options=OPTIONS)
    return state


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    tensors = {MODEL + name: value for name, value in get_model_state_dict(model, options=OPTIONS).items()}
    if optimizer is not None:
        moments = get_optimizer_state_dict(model, optimizer, options=OPTIONS)
        tensors |= {OPTIMIZER + name: value for name, value in moments.items()}
    return tensors


def _part(tensors: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _check_same(path: Path, tensors: dict[str, Any], saved: dict[str, Any], *, whole: bool) -> None:
    """Torch would read a checkpoint with more entries than asked for without a word."""
    there = {name for name in saved if whole or name.startswith(MODEL)}
    for names, what in ((tensors.keys() - there, "lacks"), (there - tensors.keys(), "has unknown")):
        if names:
            raise UserError(f"checkpoint {path} {what} {_some(names)}; it belongs to another model config")
    for name, value in tensors.items():
        entry = saved[name]
        if (
            isinstance(value, Tensor)
            and isinstance(entry, TensorStorageMetadata)
            and entry.size != value.shape
        ):
            raise UserError(
                f"checkpoint {path}: {name} has shape {list(entry.size)}, the model has {list(value.shape)}; "
                "it belongs to another model config"
            )


def _some(names: Iterable[str]) -> str:
    """The first three names and the number of the others."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(ordered[:3]) + more


@contextmanager
def _failures_named(path: Path, done: Literal["read", "written"]) -> Generator[None, None, None]:
    """Turn what disks, memory and damaged files raise into a UserError; torch gives every rank the failures of all.

    A checkpoint is called damaged when all that failed proves it: where one rank could not read, nobody should delete.
    """
    try:
        yield
    except (Exception, CheckpointException) as error:
        causes = (
            [cause for cause, _ in error.failures.values()]
            if isinstance(error, CheckpointException)
            else [error]
        )
        others = [cause for cause in causes if done == "written" or not _proves_damage(path, cause)]
        advice = [_advice(cause, done) for cause in others]
        if None in advice:
            raise
        if others:
            raise UserError(f"checkpoint {path} cannot be {done} ({_said(others[0])}); {advice[0]}") from None
        raise UserError(
            f"checkpoint {path} is damaged ({_said(causes[0])}); delete it to go on from the checkpoint before it"
        ) from None


def _proves_damage(path: Path, cause: BaseException) -> bool:
    if isinstance(cause, FileNotFoundError):
        return path.is_dir()  # complete when it was renamed; where all of it is gone, so may be the disk
    return isinstance(cause, DAMAGE) or (
        isinstance(cause, RuntimeError) and any(word in str(cause) for word in BROKEN_ARCHIVE)
    )


def _advice(cause: BaseException, done: str) -> str | None:
    """What to do about a failure that proves no damage; None for a defect, which keeps its traceback."""
    if isinstance(cause, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(cause):
        return "give it more memory, or more ranks, and run again"
    if isinstance(cause, OSError):
        return (
            f"mend that and run again{', it goes on from the checkpoint before' if done == 'written' else ''}"
        )
    if done == "read" and isinstance(cause, (AttributeError, ImportError)):
        return f"read it with the torch that wrote it, this is {torch.__version__}"
    return None


def _said(cause: BaseException) -> str:
    return f"{type(cause).__name__}: {cause}"


@contextmanager
def _expected_alone() -> Generator[None, None, None]:
    """Without a process group torch warns that it assumes one process; that is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _flush(directory: Path) -> None:
    """Flush the entries of a directory to disk. Its files were flushed by whoever wrote them."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
