"""The derived arithmetic of a run, printed once before its first step, so that a wrong run is seen there.

data set  lines of the caller
model     parameters of each part, what is trained, what a rank holds of them
device    processes, mesh, dtype, attention, recomputation
batch     packs per step = per microbatch x accumulated x ranks; room for tokens and patches
memory    expected on the fullest rank, by parts (trainer.memory)
length    steps, and where it starts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch

from shared.geometry import Budget
from trainer.config import RunConfig
from trainer.flops import model_flops, peak_flops
from trainer.metrics import Measures
from trainer.optim import lr_factor, lr_multiplier
from trainer.parallel.mesh import AXES, World
from trainer.plan import describe_parameters, memory_of_ranks, meta_model, parameters_by_part


def describe_run(
    config: RunConfig,
    budget: Budget,
    world: World,
    *,
    data: Sequence[str],
    start_step: int,
    planned_steps: int,
) -> list[str]:
    """`data` says what is trained on, a line each; `planned_steps` were those of the config before this start."""
    batch = config.batch
    holds, memory = max(memory_of_ranks(config, budget, world.size), key=lambda rank: rank[1].total)
    sizes = {name: size for name, size in asdict(memory).items() if size}
    parameters = describe_parameters(parameters_by_part(meta_model(config)))
    axes = [f"{axis} {world.axis_size(axis)}" for axis in AXES if world.axis_size(axis) > 1]
    processes = "1 process" if world.size == 1 else f"{world.size} processes"
    start = f"resumed after step {start_step}" if start_step else "from step 0"
    recompute = f", recompute {config.compute.recompute}" if config.compute.recompute != "none" else ""
    compiled = ", compiled" if config.compute.compile else ""
    reduced = f", reduced once per {config.compute.reduce}" if world.size > 1 else ""
    lines = [
        *(f"data set  {line}" for line in data),
        f"packs     of S {budget.S}, N {budget.N} x L {budget.L}",
        f"model     {parameters}; trained: {', '.join(config.trained)}; {holds['shard'] / 1e6:,.2f} M on a rank",
        f"device    {processes} on {world.device.type}{', mesh ' + ' x '.join(axes) if axes else ''}, {config.dtype}, "
        f"attention {config.compute.backend(world.device.type)}{recompute}{compiled}{reduced}",
        f"batch     {batch.packs_per_step} packs = {batch.packs_per_microbatch} per microbatch x "
        f"{batch.accumulation(world.dp_size)} accumulated x {world.dp_size} ranks: room for "
        f"{batch.packs_per_step * budget.S:,} tokens and {batch.packs_per_step * budget.N * budget.L:,} patches",
        f"memory    about {memory.total / 1e9:,.2f} GB on the fullest rank: "
        + ", ".join(f"{name} {size / 1e9:,.2f}" for name, size in sizes.items()),
        f"length    {config.steps:,} steps, {start}",
        f"run       {config.out}",
    ]
    return [*lines, *_changed_schedule(config, start_step, planned_steps)]


def _changed_schedule(config: RunConfig, start_step: int, planned_steps: int) -> list[str]:
    """Another length is another curve, but for a stable rate that has not begun to decay."""
    if start_step >= config.steps:
        return []
    planned, now = (lr_factor(start_step, steps, config.schedule) for steps in (planned_steps, config.steps))
    if planned == now:
        return []
    before, after = (
        config.optimizer.lr * lr_factor(step, steps, config.schedule)
        for step, steps in ((start_step - 1, planned_steps), (start_step, config.steps))
    )
    return [
        f"schedule  the {config.schedule.kind} now ends at step {config.steps:,}, it was on its way to "
        f"{planned_steps:,}: the learning rate goes from {before:.2e} to {after:.2e}"
    ]


def measures_of_run(
    config: RunConfig, budget: Budget, sources: Sequence[str], device: torch.device
) -> Measures:
    """What the rows of a run are computed with."""
    whole = meta_model(config)
    trained = [name for name, parameter in whole.named_parameters() if parameter.requires_grad]
    packs = config.batch.packs_per_step
    return Measures(
        sources=sources,
        lr_multipliers=sorted({lr_multiplier(name, config.optimizer.lr_multipliers) for name in trained}),
        step_tokens=packs * budget.S,
        step_patches=packs * budget.N * budget.L,
        flops=model_flops(whole, config.projector.merge),
        peak_flops=peak_flops(device, config.log.peak_flops),
    )
