"""What a run measures: one row per step, to the console (trainer.console) and to files (trainer.trackers).

Losses, norms and the guard's counts stay on the device until `log.every` steps are together; then they are
summed over the ranks and read at once. So nothing waits for the device in between, and still every step has its
own row.

Rates are over the wall time of the interval, the same for all its rows: on a GPU the host's own time per step
says nothing. Tokens, patches and labels are useful ones over all ranks; rates with `_all` count padding too.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.config import require_at_least
from trainer.console import Console, progress_line
from trainer.data.counts import Counts
from trainer.data.order import Imbalance
from trainer.flops import ModelFlops
from trainer.gradients import total_norm
from trainer.optim import PARTS
from trainer.parallel.mesh import World
from trainer.trackers import ROWS, Trackers, keep_rows

# What a run has trained on so far, over all its starts, and the column of a row that adds to it.
SEEN = {"tokens_seen": "tokens", "images_seen": "images"}
# Weight that a step keeps in the time left when the next one is in: the mean is of about the last 20 steps.
MEMORY = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    every: int = 10
    """Steps between readings of the device: rows are written, and the live line is renewed, this often."""
    print_every: int = 50
    """Steps between lines that stay, on a terminal and in a log; at most one per reading."""
    peak_flops: float = 0.0
    """Dense bfloat16 FLOPs per second of one device, for MFU; 0: by its name (trainer.flops)."""
    wandb_project: str = ""
    """Weights & Biases project to send rows to as well; empty: none."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "every", "print_every")
        require_at_least(self, 0, "peak_flops")


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Measures:
    """What rows are computed with, the same for all steps of a run."""

    sources: Sequence[str]
    """Names, in the order of `StepStats.source_nll`."""
    lr_multipliers: Sequence[float]
    """Those that parameter groups have, over all ranks."""
    step_tokens: int
    """Room for tokens in the packs of a step."""
    step_patches: int
    flops: ModelFlops
    peak_flops: float | None
    """Of one device; None: MFU is not known."""


def read_rows(
    pending: Sequence[StepStats], seconds: float, world: World, measures: Measures
) -> list[dict[str, Any]]:
    """Rows of the steps of one interval that took `seconds`. All ranks call it; the device is read once."""
    nll_ts, waits_t, memory, norms_tp, guard_tg = _read_device(pending, world)
    tokens, patches = (
        sum(getattr(stats.counts, unit) for stats in pending) for unit in ("tokens", "patches")
    )
    rates = {
        "step_s": seconds / len(pending),
        "tokens_per_s": tokens / seconds,
        "patches_per_s": patches / seconds,
        "tokens_per_s_all": len(pending) * measures.step_tokens / seconds,
        "patches_per_s_all": len(pending) * measures.step_patches / seconds,
        "mfu": _utilization(pending, seconds, world, measures),
        "memory_gb": memory / 1e9,
    }
    per_step = zip(pending, nll_ts, waits_t, norms_tp, guard_tg, strict=True)
    return [{**_row_of_step(*of_step, measures), **rates} for of_step in per_step]


def _row_of_step(
    stats: StepStats,
    nll_s: list[float],
    wait_s: float,
    norms_p: list[float],
    guard: list[int],
    measures: Measures,
) -> dict[str, Any]:
    """What is a step's own; `norms_p` ends with the norm of all parts."""
    counts = stats.counts
    row: dict[str, Any] = {"step": stats.step, "loss": sum(nll_s) / max(1, counts.labels)}
    if len(measures.sources) > 1:
        labels_s = counts.labels_per_source.tolist()
        for name, nll, labels in zip(measures.sources, nll_s, labels_s, strict=True):
            row[f"loss/{name}"] = nll / labels if labels else None
    row["grad_norm"] = norms_p[-1]
    row |= {f"grad_norm/{part}": norm for part, norm in zip(PARTS, norms_p[:-1], strict=True)}
    row["lr"] = stats.lr
    if len(measures.lr_multipliers) > 1:
        row |= {f"lr/x{multiplier:g}": stats.lr * multiplier for multiplier in measures.lr_multipliers}
    row |= {name: getattr(counts, name) for name in ("labels", "tokens", "patches", "images", "documents")}
    skipped, _, skipped_in_all, skipped_in_a_row = guard
    return {
        **row,
        "fill_tokens": counts.tokens / measures.step_tokens,
        "fill_patches": counts.patches / measures.step_patches,
        "cost_imbalance": stats.imbalance.step,
        "cost_imbalance_microbatch": stats.imbalance.microbatch,
        "data_wait_s": wait_s,
        "skipped": skipped,
        "skipped_in_all": skipped_in_all,
        "skipped_in_a_row": skipped_in_a_row,
    }


def _read_device(pending: Sequence[StepStats], world: World) -> tuple[Any, list[float], float, Any, Any]:
    """nll per step and source, longest wait per step and largest memory of a rank; norms, and the guard's counts.

    One sum over the ranks for what differs between them (a maximum is a sum of columns of which each rank fills its
    own), one reading of the device.
    """
    device, num_steps = world.device, len(pending)
    host_tr = torch.zeros(num_steps + 1, world.size)
    host_tr[:, world.rank] = torch.tensor([*(stats.wait_s for stats in pending), peak_memory(device) / 1e9])
    nll_ts = torch.stack([stats.source_nll for stats in pending])
    summed = world.sum_on_device(
        torch.cat([nll_ts.flatten(), host_tr.to(device, non_blocking=True).flatten()])
    )
    norms_tp = torch.stack([torch.cat([s.part_norms, total_norm(s.part_norms)[None]]) for s in pending])
    # float32 holds counts exactly up to 16 million steps.
    guard_tg = torch.stack([torch.cat([s.skipped[None], s.guard_counts.float()]) for s in pending])
    values = torch.cat([summed, norms_tp.flatten(), guard_tg.flatten()]).cpu()
    sizes = [nll_ts.numel(), host_tr.numel(), norms_tp.numel(), guard_tg.numel()]
    nll, host, norms, guard = values.split(sizes)
    *waits, memory = host.view_as(host_tr).max(dim=1).values.tolist()
    shapes = ((nll, nll_ts), (norms, norms_tp), (guard.int(), guard_tg))
    nll, norms, guard = (flat.view(like.shape).tolist() for flat, like in shapes)
    return nll, waits, memory * 1e9, norms, guard


def _utilization(
    pending: Sequence[StepStats], seconds: float, world: World, measures: Measures
) -> float | None:
    """MFU: FLOPs that useful tokens and patches must take / what the devices could do in the time."""
    if measures.peak_flops is None:
        return None
    flops = sum(measures.flops.of(stats.counts) for stats in pending)
    return flops / (seconds * measures.peak_flops * world.size)


def peak_memory(device: torch.device) -> float:
    """Bytes: most that was allocated on a GPU since the last reading; most that the process ever had, on a CPU."""
    if device.type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0  # Linux counts in KiB
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return float(peak)


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
        measures: Measures,
        log: LogConfig,
        *,
        start_step: int,
        total_steps: int,
        seen: Mapping[str, int] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """`seen` is that of the steps before; `config` is what Weights & Biases shows beside the curves."""
        self.world, self.console, self.measures, self.total_steps = world, console, measures, total_steps
        self.print_every, self.printed_step = log.print_every, start_step
        self.trackers: Trackers | None = None

        def open_trackers() -> None:
            damaged = keep_rows(directory / ROWS, start_step, evaluated_again=start_step >= total_steps)
            if damaged:
                console.print(f"metrics   dropped {damaged} damaged lines of {directory / ROWS}")
            self.trackers = Trackers(
                directory, start_step=start_step, wandb_project=log.wandb_project, config=config
            )

        world.on_main(open_trackers)
        self.seen = {name: (seen or {}).get(name, 0) for name in SEEN}
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
        rows = read_rows(self.pending, time.perf_counter() - self.interval_start, self.world, self.measures)
        self.pending.clear()
        for row in rows:
            self.seen = {name: total + row[SEEN[name]] for name, total in self.seen.items()}
            row |= self.seen
        old = MEMORY ** len(rows) if self.newest else 0.0
        self.newest = rows[-1]
        self.step_s = old * self.step_s + (1 - old) * self.newest["step_s"]
        if self.trackers is not None:
            for row in rows:
                self.trackers.write(row, kind="train")
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

    def write_row(self, step: int, values: Mapping[str, float | None], *, kind: str) -> None:
        """A row of something else than a step: an evaluation, a checkpoint. All steps before it have been read."""
        if self.trackers is not None:
            self.trackers.write({"step": step, **values, **self.seen}, kind=kind)

    def close(self) -> None:
        if self.trackers is not None:
            self.trackers.close()
