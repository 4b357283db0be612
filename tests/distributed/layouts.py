"""A tiny model under any layout, and the same on one process: what both must agree on."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import SequenceParallel

from shared.geometry import Budget
from tests.trainer.batches import GEOMETRY, Document, Picture, make_batch, num_labels, tiny_config
from trainer.data.batch import Batch
from trainer.gradients import clip_gradients
from trainer.models.vlm import ModelConfig
from trainer.optim import PARTS, OptimizerConfig, freeze, make_optimizer
from trainer.parallel import context, fsdp, tensor
from trainer.parallel.mesh import ParallelConfig, World, make_world
from trainer.parallel.parallelize import ComputeConfig, ParallelModel, build_model
from trainer.parallel.pipeline import Microbatches
from trainer.step import forward, forward_backward

BUDGET = Budget(S=32, N=3, L=16)
# Eight packs with different numbers of labels; documents cross the borders of chunks. The third and fourth have no
# picture: with four data-parallel ranks one rank has none at all.
PACKS: list[list[Document]] = [
    [[7, 8, Picture(4, 2), 9, 10, 11], [12, 13]],
    [[Picture(4, 4, seed=1), 14, 15], [5, 6, 7, Picture(2, 2, seed=8), 8]],
    [[16, 17, 18, 19, 20, 21, 22, 23, 24, 25]],
    [[33], [34, 35, 36, 37, 38, 39, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]],
    [[26, 27, 28], [29, Picture(4, 4, seed=4), 30, Picture(2, 4, seed=5), 31], [32]],
    [[Picture(2, 4, seed=2), 5], [6, Picture(2, 2, seed=3), 7]],
    [[Picture(2, 6, seed=6), 16, 17], [18, 19, Picture(4, 2, seed=7)]],
    [[20, 21], [22, 23, 24], [Picture(2, 2, seed=9), 25, 26]],
]
SOURCES, STEPS, LR = 2, 3, 1e-2


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A case. `negative` spoils it on purpose: the comparison must fail then."""

    name: str
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    decoder: dict[str, Any] = field(default_factory=dict)
    packs_per_microbatch: int = 1
    dtype: str = "float32"
    trained: tuple[str, ...] = PARTS
    negative: str = ""


def model_config(layout: Layout) -> ModelConfig:
    return tiny_config(**{"num_layers": 4, **layout.decoder})


def own_rows(batch: Batch, part: tuple[int, int] | None) -> Batch:
    """The batch with this rank's vision rows, the obvious way: all rows padded to a multiple, and a slice."""
    index, count = part or (0, 1)
    rows = -(-len(batch.image_ids_NL) // count) if part else 0
    cut = {}
    for name in ("pixel_values_NLP", "grid_thw_NL3", "image_ids_NL", "image_sizes_NL2"):
        tensor = getattr(batch, name)
        fill = 0 if name == "pixel_values_NLP" else -1
        padding = tensor.new_full((max(rows * count - len(tensor), 0), *tensor.shape[1:]), fill)
        cut[name] = torch.cat([tensor, padding])[index * rows : (index + 1) * rows]
    return dataclasses.replace(batch, **cut)


def microbatches(world: World, packs_per_microbatch: int) -> list[Batch]:
    """This rank's microbatches of the global batch of all PACKS."""
    count = len(PACKS) // world.dp_size
    own = PACKS[world.dp_rank * count : (world.dp_rank + 1) * count]
    groups = [own[i : i + packs_per_microbatch] for i in range(0, count, packs_per_microbatch)]
    return [own_rows(two_sources(make_batch(group, BUDGET)), world.row_part) for group in groups]


def two_sources(batch: Batch) -> Batch:
    """Every second document of a pack is of source 1."""
    document_BS = (batch.positions_BS == 0).cumsum(1) % 2
    return dataclasses.replace(batch, sources_BS=torch.where(batch.sources_BS < 0, -1, document_BS.int()))


def build(layout: Layout, world: World, seed: int = 4) -> ParallelModel:
    count = len(PACKS) // world.dp_size // layout.packs_per_microbatch
    return build_model(
        model_config(layout),
        GEOMETRY,
        world,
        dtype=layout.dtype,
        seed=seed,
        parallel=layout.parallel,
        compute=layout.compute,
        microbatches=Microbatches(budget=BUDGET, packs=layout.packs_per_microbatch, count=count),
        prepare=lambda parts: freeze(parts, layout.trained),
    )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients_of(model: ParallelModel) -> dict[str, torch.Tensor]:
    return {
        name: whole(p.grad).clone()
        for part in model.parts
        for name, p in part.named_parameters()
        if p.grad is not None
    }


def measure(layout: Layout, world: World) -> dict[str, Any]:
    """Loss and gradients of one global batch, the loss without training, then the losses of three steps."""
    model, batches = build(layout, world), microbatches(world, layout.packs_per_microbatch)
    labels = sum(num_labels(batch) for batch in batches) if world.is_counting else 0
    [labels] = world.sum_on_host([labels])
    step = {"num_labels": labels, "num_sources": SOURCES}
    nll = world.sum_on_device(forward_backward(model, batches, world, **step)) / labels
    gradients = gradients_of(model)
    evaluated = world.sum_on_device(forward(model, batches, world, num_sources=SOURCES)) / labels
    optimizer = make_optimizer(model.parts, OptimizerConfig(lr=LR))
    optimizer.zero_grad()
    curve = []
    for _ in range(STEPS):
        share = forward_backward(model, batches, world, **step)
        clip_gradients(model.parts, world, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        curve.append((world.sum_on_device(share).sum() / labels).item())
    return {"nll": nll, "evaluated": evaluated, "gradients": gradients, "curve": torch.tensor(curve)}


@contextmanager
def spoiled(how: str) -> Iterator[None]:
    """What goes wrong most easily, done on purpose."""
    patches: dict[str, Any] = {
        "": None,
        "factor of dp alone": patch.object(World, "loss_factor", property(lambda world: world.dp_size)),
        "no factor": patch.object(World, "loss_factor", 1),
        "shards over dp alone": patch.object(fsdp, "_mesh", lambda mesh, *axes: mesh["dp_shard"]),
        "gather without gradient": patch.object(context, "gather", gather_without_gradient),
        "heads normed without a sum": patch.object(tensor, "SequenceParallel", KeepHeads),
    }
    with patches[how] or nullcontext():
        yield


def gather_without_gradient(x: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.detach().contiguous(), group=group)
    return torch.cat(parts, dim=dim).requires_grad_()


class KeepHeads(SequenceParallel):
    """Leaves the norms of queries and keys as they are: every rank has the gradient of its own heads only."""

    def _apply(self, module: torch.nn.Module, device_mesh: Any) -> torch.nn.Module:
        return module if self.sequence_sharding[0].dim == 2 else super()._apply(module, device_mesh)


def measure_all(layouts: Sequence[Layout]) -> list[dict[str, Any]]:
    """On every rank of a launch: all layouts one after another, on one process group."""
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # full_tensor() takes two gathers
    dist.init_process_group("gloo")
    results = []
    for layout in layouts:
        world = make_world(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), layout.parallel)
        with spoiled(layout.negative):
            results.append(measure(layout, world))
    dist.destroy_process_group()
    return results


ALONE = World(rank=0, size=1, device=torch.device("cpu"), mesh=None)
