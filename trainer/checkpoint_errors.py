"""What goes wrong with a checkpoint, told in one line that says what to do.

A checkpoint is called damaged only when all that failed proves it: where one rank could not read, nobody should
delete anything.
"""

from __future__ import annotations

import pickle
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch.distributed.checkpoint.api import CheckpointException

from shared.errors import UserError

# What the content of a file that was cut short or changed raises, in json, pickle and torch; and what torch names in
# a RuntimeError when its zip archive is broken. Its other RuntimeErrors (memory, devices, networks) prove no damage.
DAMAGE = (EOFError, pickle.UnpicklingError, ValueError)
BROKEN_ARCHIVE = ("PytorchStreamReader", "inline_container", "hasRecord")


@contextmanager
def failures_named(path: Path, done: Literal["read", "written"]) -> Generator[None, None, None]:
    """Turn what disks, memory and damaged files raise into a UserError; torch gives every rank the failures of all."""
    try:
        yield
    except UserError:
        raise
    except (Exception, CheckpointException) as error:  # the latter is no Exception
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
