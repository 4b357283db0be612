"""What a run reports: a live line on the console, `metrics.jsonl` and TensorBoard.

Losses and norms stay on the device until `log.every` steps are together; then they are summed over the ranks
and read at once. So nothing waits for the device in between, and still every step has its own row.

Rates are over the wall time of the interval, the same for all its rows: on a GPU the host's own time per step
says nothing. Tokens, patches and labels are useful ones, padding not counted, over all ranks.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.config import require_at_least
from shared.files import atomic_path
from trainer.data.counts import Counts
from trainer.data.order import Imbalance
from trainer.gradients import total_norm
from trainer.parallel.mesh import World

ROWS = "metrics.jsonl"
# Weight that a step keeps in the time left when the next one is in: the mean is of about the last 20 steps.
MEMORY = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    every: int = 10
    """Steps between readings of the device: rows are written, and the live line is renewed, this often."""
    print_every: int = 50
    """Steps between lines that stay, on a terminal and in a log; at most one per reading."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "every", "print_every")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepStats:
    """One finished step, as it left the train step: nothing of it has been read from the device."""

    step: int
    """Steps finished, this one included."""
    source_nll: Tensor
    """float32 [sources]: this rank's share; the sum over ranks is the nll of the global batch, in nats."""
    part_norms: Tensor
    """float32 [parts]: gradient norms of encoder, projector and decoder, before clipping."""
    skipped: Tensor
    """1 where the guard let the step change nothing."""
    guard_counts: Tensor
    """int64 [3]: updates done, steps skipped, of them in a row."""
    lr: float
    counts: Counts
    """Of the global batch."""
    imbalance: Imbalance
    wait_s: float


def read_rows(pending: Sequence[StepStats], seconds: float, world: World) -> list[dict[str, Any]]:
    """Rows of the steps of one interval that took `seconds`. All ranks call it; the device is read once."""
    loss = world.sum_on_device(torch.stack([stats.source_nll.sum() for stats in pending]))
    grad_norm = torch.stack([total_norm(stats.part_norms) for stats in pending])
    losses, norms = torch.stack([loss, grad_norm]).tolist()
    rates = {
        "tokens_per_s": sum(stats.counts.tokens for stats in pending) / seconds,
        "patches_per_s": sum(stats.counts.patches for stats in pending) / seconds,
        "step_s": seconds / len(pending),
    }
    return [
        {
            "step": stats.step,
            "loss": losses[i] / max(1, stats.counts.labels),
            "grad_norm": norms[i],
            "lr": stats.lr,
            "labels": stats.counts.labels,
            "tokens": stats.counts.tokens,
            "patches": stats.counts.patches,
            "cost_imbalance": stats.imbalance.step,
            "cost_imbalance_microbatch": stats.imbalance.microbatch,
            "data_wait_s": stats.wait_s,
            **rates,
        }
        for i, stats in enumerate(pending)
    ]


class Console:
    """Lines for a person: permanent ones, and on a terminal one that is redrawn in place."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.terminal = enabled and sys.stdout.isatty()
        self.redrawing = False

    def print(self, text: str) -> None:
        """A line that stays; a line being redrawn stays above it as it is."""
        if self.enabled:
            print(f"\n{text}" if self.redrawing else text, flush=True)
        self.redrawing = False

    def print_over(self, text: str) -> None:
        """A line that stays, in the place of the line being redrawn."""
        if self.enabled:
            print(f"\r\x1b[2K{text}" if self.terminal else text, flush=True)
        self.redrawing = False

    def redraw(self, text: str) -> None:
        """Replace the line being redrawn; elsewhere than on a terminal, nothing."""
        if self.terminal:
            print(f"\r\x1b[2K{text}", end="", flush=True)
            self.redrawing = True


class Reporter:
    """Collects finished steps; reads them, writes and prints them once per interval.

    Every rank has one and calls it alike, because reading sums over the ranks; only rank 0 writes and prints.
    Rows of the files after `start_step` are those of a killed run and are dropped; a finished run is only
    evaluated again, and the new row takes the place of the old one.
    """

    def __init__(
        self,
        directory: Path,
        world: World,
        console: Console,
        *,
        start_step: int,
        total_steps: int,
        print_every: int,
    ) -> None:
        self.world, self.console, self.total_steps = world, console, total_steps
        self.print_every, self.printed_step = print_every, start_step
        self.files = None
        if world.is_main:
            damaged = keep_rows(directory / ROWS, start_step, evaluated_again=start_step >= total_steps)
            if damaged:
                console.print(f"metrics   dropped {damaged} damaged lines of {directory / ROWS}")
            self.files = MetricFiles(directory, start_step=start_step)
        self.pending: list[StepStats] = []
        self.newest: dict[str, Any] = {}
        self.step_s = 0.0
        self.interval_start = time.perf_counter()

    def add(self, stats: StepStats) -> None:
        self.pending.append(stats)
        if self.newest:
            self.console.redraw(self.progress_line(stats.step))

    def flush(self) -> list[dict[str, Any]]:
        """Read, write and print what is pending; returns its rows, the same on every rank."""
        if not self.pending:
            return []
        rows = read_rows(self.pending, time.perf_counter() - self.interval_start, self.world)
        self.pending.clear()
        old = MEMORY ** len(rows) if self.newest else 0.0
        self.newest = rows[-1]
        self.step_s = old * self.step_s + (1 - old) * self.newest["step_s"]
        if self.files is not None:
            for row in rows:
                self.files.write(row, kind="train")
        step = self.newest["step"]
        line = self.progress_line(step)
        if step // self.print_every > self.printed_step // self.print_every or step == self.total_steps:
            self.console.print_over(line)
            self.printed_step = step
        else:
            self.console.redraw(line)
        self.restart_interval()
        return rows

    def progress_line(self, step: int) -> str:
        return progress_line(self.newest, step=step, total_steps=self.total_steps, step_s=self.step_s)

    def restart_interval(self) -> None:
        """Leave the time since the last `flush` out of the rates: it went into something else."""
        self.interval_start = time.perf_counter()

    def write_evaluation(self, step: int, values: Mapping[str, float | None]) -> None:
        if self.files is not None:
            self.files.write({"step": step, **values}, kind="eval")

    def close(self) -> None:
        if self.files is not None:
            self.files.close()


class MetricFiles:
    """metrics.jsonl and TensorBoard."""

    def __init__(self, directory: Path, *, start_step: int) -> None:
        # Imported here: it takes a second, which runs on other ranks and tests need not pay.
        from torch.utils.tensorboard import SummaryWriter

        self.rows = open(directory / ROWS, "a", encoding="utf-8")  # closed by close()
        self.board = SummaryWriter(str(directory / "tensorboard"), purge_step=start_step + 1)

    def write(self, row: Mapping[str, Any], *, kind: str) -> None:
        """Append one row; `kind` ("train" or "eval") groups its curves.

        JSON knows no nan and no infinity: what was not measured or is not finite is null, and no point.
        """
        values = {name: value if is_finite(value) else None for name, value in row.items()}
        self.rows.write(json.dumps({"kind": kind, **values}, allow_nan=False) + "\n")
        self.rows.flush()
        for name, value in values.items():
            if name != "step" and value is not None:
                self.board.add_scalar(f"{kind}/{name}", value, row["step"])

    def close(self) -> None:
        self.rows.close()
        self.board.close()


def keep_rows(path: Path, step: int, *, evaluated_again: bool) -> int:
    """Drop the rows after `step`, and the evaluation of `step` if it is about to be done again.

    Returns how many damaged lines were dropped as well; a kill leaves one at most, the last.
    """
    if not path.exists():
        return 0
    kept: list[bytes] = []
    damaged = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
            kind, at = row["kind"], int(row["step"])
        except (ValueError, KeyError, TypeError):
            damaged += 1
            continue
        if at < step or (at == step and not (evaluated_again and kind == "eval")):
            kept.append(line if line.endswith(b"\n") else line + b"\n")
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"".join(kept))
    return damaged


def is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def first_diverged(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The first row whose step no longer trains anything: its update makes every weight nan."""
    return next((row for row in rows if not (is_finite(row["loss"]) and is_finite(row["grad_norm"]))), None)


def progress_line(row: Mapping[str, Any], *, step: int, total_steps: int, step_s: float) -> str:
    """One line about the newest `row` that was read; `step` is how far the run is, `step_s` a mean."""
    left = round((total_steps - step) * step_s)
    ahead = f"  (step {step} done, not read yet)" if step != row["step"] else ""
    return (
        f"step {row['step']:>{len(str(total_steps))}}/{total_steps}  loss {row['loss']:.4f}  "
        f"grad {row['grad_norm']:.3f}  lr {row['lr']:.2e}  "
        f"{row['tokens_per_s']:,.0f} tok/s  {row['patches_per_s']:,.0f} patch/s  "
        f"wait {1000 * row['data_wait_s']:.1f} ms  left {left // 60}:{left % 60:02}{ahead}"
    )
