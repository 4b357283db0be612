"""Checkpoints that are complete or absent.

    checkpoints/step_00000100.tmp/   being written, or left by a killed run: removed at the next start
    checkpoints/step_00000100/       complete: model and optimizer in shards, and state.json

A checkpoint is never written over another one (torch would then mix two steps after a kill without noticing):
it is written beside, flushed and renamed. Parameters are named, not numbered, so it loads under any layout.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import warnings
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from shared.files import read_json, write_json
from trainer.parallel.mesh import World

NAME = re.compile(r"step_(\d{8})")
MODEL, OPTIMIZER = "model.", "optimizer."
# What reading a file that was cut short or changed raises, in pickle, zip and torch.
DAMAGE = (OSError, EOFError, pickle.UnpicklingError, ValueError, RuntimeError)
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
    """
    final = directory / f"step_{state['step']:08d}"
    if final.exists():
        return final
    temporary = final.with_suffix(".tmp")
    with _expected_alone():
        save(_tensors(model, optimizer), checkpoint_id=temporary, no_dist=world.mesh is None)
    if world.is_main:
        write_json(temporary / "state.json", state)
        _flush(temporary)
        os.rename(temporary, final)
        _flush(directory)
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
        UserError: the checkpoint is damaged, or holds other parameters or shapes; names it, and them.
    """
    state = read_json(path / "state.json", mend=f"delete {path} to go on from the checkpoint before it")
    tensors = _tensors(model, optimizer)
    reader = FileSystemReader(path)
    with _damage_named(path):
        saved = reader.read_metadata().state_dict_metadata
    _check_same(path, tensors, saved, whole=optimizer is not None)
    with _damage_named(path), _expected_alone():
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
def _damage_named(path: Path) -> Generator[None, None, None]:
    """Turn what damaged files raise into a UserError; torch gives every rank the failures of all."""
    try:
        yield
    except DAMAGE as error:
        causes: list[BaseException] = [error]
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        if any(
            isinstance(cause, torch.OutOfMemoryError) or not isinstance(cause, DAMAGE) for cause in causes
        ):
            raise
    else:
        return
    raise UserError(
        f"checkpoint {path} is damaged ({type(causes[0]).__name__}: {causes[0]}); delete it to go on from the "
        "checkpoint before it"
    )


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
