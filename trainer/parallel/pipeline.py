"""Pipeline parallelism: consecutive decoder layers on consecutive ranks, encoder and embedding in the first stage.

    stages_per_rank 1   1F1B: a rank holds one stage
    above               interleaved 1F1B: rank r holds stages r, r + pp, ..; the bubble shrinks by that factor

Only hidden states travel between stages. What else a stage needs of a microbatch (positions, masks; pictures
in the first; labels in the last) its ranks have loaded themselves: every rank of a pipeline reads the same packs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import tee
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from shared.geometry import Budget
from trainer.data.batch import Batch
from trainer.models.vlm import Masks, VisionLanguageModel
from trainer.parallel.mesh import ParallelConfig, World


def stage_layers(num_layers: int, parallel: ParallelConfig) -> list[range]:
    """Decoder layers of every stage; without `stage_layers` as even as they go, the first stages shorter.

    The first stage has the encoder as well, the last one the head.

    Raises:
        ValueError: the layers cannot be divided that way.
    """
    stages = parallel.num_stages
    counts = list(parallel.stage_layers)
    if not counts:
        counts = [(num_layers + s) // stages for s in range(stages)]
    if sum(counts) != num_layers or min(counts) < 1:
        raise ValueError(f"{num_layers} decoder layers cannot be divided into stages of {counts}")
    ends = [sum(counts[: s + 1]) for s in range(stages)]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def cut_stage(model: VisionLanguageModel, layers: range, num_layers: int) -> None:
    """Take out of a whole model what a stage does not have, in place."""
    for name in [name for name in model.decoder.layers if int(name) not in layers]:
        del model.decoder.layers[name]
    if layers.start > 0:
        model.encoder = model.projector = model.decoder.embed_tokens = None
    if layers.stop < num_layers:
        model.decoder.norm = model.decoder.lm_head = None


class StageModel(VisionLanguageModel):
    """A stage that takes the next microbatch itself: the schedule hands tensors on, no batches.

    Both schedules run the forwards of a stage in the order of the microbatches. (Told the number of one, as a
    tensor, it would have to read it from the device: FSDP moves what a model is called with there.)
    """

    feed: Iterator[tuple[Batch, Masks]] = iter(())

    def forward(self, *h_BSD: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        batch, masks = next(self.feed)
        return super().forward(batch, *h_BSD, masks=masks)


@dataclass(frozen=True, kw_only=True, slots=True)
class Microbatches:
    """Sizes that are the same for every microbatch of a run."""

    budget: Budget
    packs: int
    """B"""
    count: int
    """Per optimizer step."""


class Pipeline:
    """The stages of this rank and their schedule; `width` is D, `dtype` that of hidden states."""

    def __init__(
        self,
        parts: Sequence[StageModel],
        world: World,
        parallel: ParallelConfig,
        microbatches: Microbatches,
        *,
        width: int,
        dtype: torch.dtype,
    ) -> None:
        assert world.mesh is not None
        self.parts, self.num_microbatches = list(parts), microbatches.count
        self.loss: Callable[[Tensor, int], Tensor] | None = None
        positions = microbatches.budget.S // parallel.cp
        travelling = positions // (parallel.tp if parallel.sequence_parallel else 1)
        # Shapes are given: torch would find them out by running the model once more.
        h = torch.empty(microbatches.packs, travelling, width, dtype=dtype, device="meta", requires_grad=True)
        nll = torch.empty(microbatches.packs, positions, device="meta", requires_grad=True)
        stages: list[Any] = []
        for number, part in enumerate(parts):
            index = world.pp_rank + number * parallel.pp
            output = nll if index == parallel.num_stages - 1 else h
            stages.append(
                PipelineStage(
                    part, index, parallel.num_stages, world.device,
                    input_args=() if index == 0 else (h,), output_args=(output,), group=world.mesh.get_group("pp"),
                )
            )  # fmt: skip
        self.has_loss = stages[-1].is_last
        options: dict[str, Any] = {"loss_fn": self._loss, "scale_grads": False}
        self.schedule: Any = (
            ScheduleInterleaved1F1B(stages, microbatches.count, **options)
            if len(stages) > 1
            else Schedule1F1B(stages[0], microbatches.count, **options)
        )

    def _loss(self, nll_BS: Tensor, microbatch: Tensor) -> Tensor:
        assert self.loss is not None, "no loss outside `run`"
        return self.loss(nll_BS, int(microbatch))

    def run(
        self, feed: Iterator[tuple[Batch, Masks]], loss: Callable[[Tensor, int], Tensor], *, train: bool
    ) -> None:
        """Forward, and backward if `train`, of exactly `num_microbatches` microbatches, which `feed` gives in order.

        `loss(nll_BS, microbatch)` is called on the last stage and returns what backward starts from.
        """
        self.loss = loss
        # What a stage has taken is kept until the other stages here have taken it.
        for part, own in zip(self.parts, tee(feed, len(self.parts)), strict=True):
            part.feed = own
        # On the host, where only the loss reads them: nothing waits.
        numbers = torch.arange(self.num_microbatches)
        target, losses = (numbers, []) if self.has_loss else (None, None)
        if train:
            self.schedule.step(target=target, losses=losses, return_outputs=False)
        else:
            self.schedule.eval(target=target, losses=losses)
        self.loss = None
        for part in self.parts:
            part.feed = iter(())
