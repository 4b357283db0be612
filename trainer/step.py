"""One optimizer step: forward and backward of every microbatch, clipping, update.

    loss = sum of nll over the global batch / number of labels in the global batch

so that every split into ranks and microbatches gives the same loss and the same gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.data.batch import Batch
from trainer.data.counts import Counts
from trainer.data.loader import Step
from trainer.gradients import clip_gradients, total_norm
from trainer.guard import Guard, update_weights
from trainer.metrics import StepStats
from trainer.parallel.mesh import World
from trainer.parallel.parallelize import ParallelModel
from trainer.profile import named


def train_step(
    model: ParallelModel,
    optimizer: torch.optim.Optimizer,
    guard: Guard,
    step: Step,
    world: World,
    *,
    lr: float,
    max_grad_norm: float,
) -> StepStats:
    """Train on this rank's part of one global batch. Every rank calls it; nothing is read from the device."""
    counts = sum_counts(step.counts, world)
    source_nll = forward_backward(
        model, step.microbatches, world,
        num_labels=counts.labels, num_sources=len(counts.labels_per_source),
    )  # fmt: skip
    with named("optimizer"):
        part_norms = clip_gradients(model.parts, world, max_grad_norm)
        skipped = guard.judge(total_norm(part_norms))
        update_weights(optimizer, lr, skipped)
    return StepStats(
        step=step.index + 1,
        source_nll=source_nll,
        part_norms=part_norms,
        skipped=skipped,
        guard_counts=guard.counts,
        lr=lr,
        counts=counts,
        imbalance=step.imbalance,
        wait_s=step.wait_s,
    )


def sum_counts(counts: Counts, world: World) -> Counts:
    """Of the global batch, from those of this data-parallel rank."""
    own = counts.to_list()
    return Counts.from_list(world.sum_on_host(own if world.is_counting else [0] * len(own)))


def forward_backward(
    model: ParallelModel, batches: Sequence[Batch], world: World, *, num_labels: int, num_sources: int
) -> Tensor:
    """Add the gradients of the global loss; returns this rank's share of the nll of each source.

    `num_labels` counts the global batch. See `_run` for the shares.
    """
    return _run(model, batches, world, num_sources, scale=world.loss_factor / max(1, num_labels), train=True)


@torch.no_grad()
def forward(model: ParallelModel, batches: Sequence[Batch], world: World, *, num_sources: int) -> Tensor:
    """This rank's share of the nll of each source, of microbatches that nothing is learned from."""
    return _run(model, batches, world, num_sources, scale=1.0, train=False)


def _run(
    model: ParallelModel,
    batches: Sequence[Batch],
    world: World,
    num_sources: int,
    *,
    scale: float,
    train: bool,
) -> Tensor:
    """float32 [sources]; the sum over all ranks is the nll of the global batch by source, in nats.

    Ranks without the head have zeros; the ranks of axis tp have the same tokens, and a part of each.
    """
    sums = torch.zeros(num_sources, device=world.device)
    [first, *_] = model.parts

    def loss(nll_BS: Tensor, number: int) -> Tensor:
        sums.add_(sums_by_source(nll_BS.detach(), first.own(batches[number].sources_BS), num_sources))
        return nll_BS.sum() * scale

    model.run(batches, loss, train=train)
    return sums / world.tp_size


def sums_by_source(nll_BS: Tensor, sources_BS: Tensor, num_sources: int) -> Tensor:
    """nll of each source, float32 [sources]. A product, as scattered sums on a GPU differ from run to run."""
    source_s = torch.arange(num_sources, device=nll_BS.device)
    return nll_BS.flatten() @ (sources_BS.flatten()[:, None] == source_s).float()
