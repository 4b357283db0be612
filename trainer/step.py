"""One optimizer step: forward and backward of every microbatch, clipping, update.

    loss = sum of nll over the global batch / number of labels in the global batch

so that every split into ranks and microbatches gives the same loss and the same gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trainer.data.counts import Counts
from trainer.metrics import StepStats
from trainer.models.vlm import VisionLanguageModel
from trainer.optim import clip_gradients, set_lr
from trainer.parallel.fsdp import sync_gradients
from trainer.parallel.mesh import World

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from trainer.data.batch import Batch
    from trainer.data.loader import Step


def train_step(
    model: VisionLanguageModel,
    optimizer: torch.optim.Optimizer,
    step: Step,
    world: World,
    *,
    lr: float,
    max_grad_norm: float,
) -> StepStats:
    """Train on this rank's part of one global batch. Every rank calls it; nothing is read from the device."""
    counts = Counts.from_list(world.sum_on_host(step.counts.to_list()))
    loss = backward(model, step.microbatches, counts.labels, dp_size=world.dp_size)
    grad_norm = clip_gradients(model, max_grad_norm)
    set_lr(optimizer, lr)
    optimizer.step()
    optimizer.zero_grad()
    return StepStats(
        step=step.index + 1,
        loss=loss,
        grad_norm=grad_norm,
        lr=lr,
        labels=counts.labels,
        tokens=counts.tokens,
        patches=counts.patches,
        imbalance=step.imbalance,
        wait_s=step.wait_s,
    )


def backward(
    model: VisionLanguageModel, microbatches: Sequence[Batch], num_labels: int, *, dp_size: int
) -> Tensor:
    """Add the gradients of the global loss; returns this rank's share of it.

    `num_labels` counts the global batch. FSDP averages gradients over `dp_size` ranks, where the global loss
    is a sum over them: the factor undoes it.
    """
    shares: list[Tensor] = []
    for i, batch in enumerate(microbatches):
        sync_gradients(model, enabled=i == len(microbatches) - 1)
        share = model(batch).sum() / max(1, num_labels)
        (share * dp_size).backward()
        shares.append(share.detach())
    return torch.stack(shares).sum()
