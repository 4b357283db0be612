"""Steps that would do harm are skipped, on the device: a gradient norm that is not finite, or a spike.

    norm --> finite and below spike_factor * running mean?  yes: update, and into the mean   no: skip, and count

Nothing waits for the decision: fused AdamW takes it as `found_inf`, a number on the device, and leaves
parameters, moments and its own step count as they were. The host learns of it when it reads the rows, and
then ends a run that skips too much. All ranks have the same norm, so they decide alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shared.config import require_at_least
from shared.errors import UserError
from trainer.optim import set_lr

# The mean is that of all norms first, then of about the last 50.
NEWEST_WEIGHT = 0.02
# Steps that a message names.
SHOWN = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    spike_factor: float = 0.0
    """A step is skipped whose gradient norm is above this multiple of its running mean; 0: none is for that."""
    warmup_steps: int = 100
    """Updates before a spike can be told: the first norms are large and fall fast."""
    max_skipped: int = 100
    """Steps that may be skipped in all, over the whole run; one more ends it."""
    max_consecutive: int = 5
    """Steps that may be skipped in a row."""

    def __post_init__(self) -> None:
        if self.spike_factor and self.spike_factor <= 1:
            raise ValueError(f"spike_factor must be above 1, or 0 for none, got {self.spike_factor}")
        require_at_least(self, 0, "warmup_steps", "max_skipped", "max_consecutive")


class Guard:
    """The running mean and the counts; they belong into the checkpoint."""

    def __init__(self, config: GuardConfig, device: torch.device) -> None:
        self.config = config
        self.mean = torch.zeros((), device=device)
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)
        """Updates done, steps skipped, of them in a row up to now."""

    def judge(self, norm: Tensor) -> Tensor:
        """Whether to skip the step whose gradient norm this is: a float32 1 or 0 on the device."""
        updates = self.counts[0]
        skip = ~norm.isfinite()
        if self.config.spike_factor:
            warm = updates >= self.config.warmup_steps
            skip |= warm & (norm > self.config.spike_factor * self.mean)
        weight = (1 / (updates + 1)).clamp(min=NEWEST_WEIGHT)
        self.mean = torch.where(skip, self.mean, self.mean.lerp(norm, weight))
        done, skipped, in_a_row = self.counts.unbind()
        self.counts = torch.stack([done + ~skip, skipped + skip, torch.where(skip, in_a_row + 1, 0)])
        return skip.float()

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "counts": self.counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.mean = state["mean"].to(self.mean)
        self.counts = state["counts"].to(self.counts)


def update_weights(optimizer: torch.optim.Optimizer, lr: float, skip: Tensor) -> None:
    """One step of a fused optimizer, or none where `skip` is 1; gradients are gone after it."""
    set_lr(optimizer, lr)
    optimizer.found_inf = skip  # pyright: ignore[reportAttributeAccessIssue]  # where Optimizer.step of fused AdamW looks for it
    optimizer.step()
    optimizer.zero_grad()


def check_skipped(
    rows: Sequence[Mapping[str, Any]],
    config: GuardConfig,
    show_packs: Callable[[int], str],
    out: str,
) -> None:
    """End a run that skips too much; `show_packs(step)` names those of the step that finished as number `step`.

    Raises:
        UserError: names the steps of `rows` that were skipped, the packs of the last, and what to do.
    """
    bad = [row for row in rows if row["skipped"]]
    if not bad:
        return
    in_a_row, in_all = max(row["skipped_in_a_row"] for row in bad), bad[-1]["skipped_in_all"]
    if in_a_row <= config.max_consecutive and in_all <= config.max_skipped:
        return
    last, more = bad[-1], f" and {len(bad) - SHOWN} before" if len(bad) > SHOWN else ""
    shown = ", ".join(str(row["step"]) for row in bad[-SHOWN:]) + more
    raise UserError(
        f"run {out}: diverged: {in_all} steps skipped in all, {in_a_row} in a row (guard.max_skipped "
        f"{config.max_skipped}, guard.max_consecutive {config.max_consecutive}), among them {shown}; at step "
        f"{last['step']} loss {last['loss']}, gradient norm {last['grad_norm']}, learning rate {last['lr']:.2e}. Try a "
        f"lower optimizer.lr or a longer schedule.warmup_steps with another --out, and look at the packs of step "
        f"{last['step']} (split train: {show_packs(last['step'])}) with `python -m preprocess inspect`"
    )
