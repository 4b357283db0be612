"""Traces of chosen steps by torch's profiler, for chrome://tracing or Perfetto: RUN/profile/step_N_rank_R.json.

What a step spends its time on has a name there: data, forward, backward, optimizer. Where nothing is profiled a
name costs nothing: `named` is then a context that does nothing.

The first steps compile and fill caches; a step after the tenth shows what the others will be like. A profiled step
waits for the device at its end, so that the trace holds all of it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from trainer.parallel.mesh import World


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig:
    steps: tuple[int, ...] = ()
    """Steps to trace, each by itself, counted from 1 as rows are; none by default."""
    all_ranks: bool = False
    """A trace of every rank, not of rank 0 alone."""

    def __post_init__(self) -> None:
        if any(step < 1 for step in self.steps):
            raise ValueError(f"steps must be at least 1, got {list(self.steps)}")


class Profiler:
    """`begin(step)` and `end(step)` around every step; only those of the config are traced."""

    def __init__(self, config: ProfileConfig, out: Path, world: World) -> None:
        self.steps = set(config.steps) if world.is_main or config.all_ranks else set[int]()
        self.directory, self.world = out / "profile", world
        self.trace: Any = None

    def begin(self, step: int) -> None:
        """Before the data of the step that will finish as number `step`."""
        if step not in self.steps:
            return
        cuda = [ProfilerActivity.CUDA] if self.world.device.type == "cuda" else []
        self.trace = profile(activities=[ProfilerActivity.CPU, *cuda], record_shapes=True)
        self.trace.start()

    def end(self, step: int) -> Path | None:
        """Write the trace of the step, if there is one."""
        if self.trace is None:
            return None
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        self.trace.stop()
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"step_{step}_rank_{self.world.rank}.json"
        self.trace.export_chrome_trace(str(path))
        self.trace = None
        return path


def named(name: str) -> AbstractContextManager[Any]:
    """What happens inside is called `name` in a trace."""
    running = torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]  # there is no public way to ask
    return record_function(name) if running else nullcontext()
