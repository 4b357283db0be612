"""Norms of the gradients per part of the model, and their scaling, over any layout.

Every rank adds up the squares of the shards that it holds; what several ranks hold alike is divided by their
number. One all-reduce over all ranks then gives every rank the norm of every part, those of other pipeline
stages included. (torch's clipping refuses gradients on several meshes, and reduces each mesh by itself.)

    ranks that hold a shard alike = dp * cp * tp / ranks of the parameter's mesh * its replicated axes
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.optim import PARTS
from trainer.parallel.mesh import World


@torch.no_grad()
def gradient_norms(parts: Sequence[nn.Module], world: World) -> Tensor:
    """float32 [3]: the norm of the gradients of encoder, projector and decoder. All ranks call it; nothing waits."""
    shards: dict[tuple[str, int], list[Tensor]] = {}
    for name, gradient in _gradients(parts):
        key = (name.partition(".")[0], _replicas(gradient, world.stage_ranks))
        shards.setdefault(key, []).append(_local(gradient))
    squares = torch.zeros(len(PARTS), device=world.device)
    for (part, replicas), local in shards.items():
        norms = torch.stack(torch._foreach_norm(local, dtype=torch.float32))  # pyright: ignore[reportPrivateImportUsage]  # what torch.nn.utils uses
        squares[PARTS.index(part)] += norms.square().sum() / replicas
    return world.sum_on_device(squares).sqrt()


def total_norm(part_norms: Tensor) -> Tensor:
    return part_norms.square().sum().sqrt()


@torch.no_grad()
def scale_gradients(parts: Sequence[nn.Module], factor: Tensor) -> None:
    """Multiply all gradients by a number on the device."""
    local = [_local(gradient) for _, gradient in _gradients(parts)]
    if local:
        torch._foreach_mul_(local, factor)  # pyright: ignore[reportPrivateImportUsage]  # what torch.optim uses


def clip_gradients(parts: Sequence[nn.Module], world: World, max_norm: float) -> Tensor:
    """Scale all gradients so that their joint norm is at most `max_norm`; returns the norms per part before that."""
    norms = gradient_norms(parts, world)
    # 1e-6 as in torch's own clip_grad_norm_: no division by 0.
    scale_gradients(parts, (max_norm / (total_norm(norms) + 1e-6)).clamp(max=1.0))
    return norms


def _gradients(parts: Sequence[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for part in parts:
        for name, parameter in part.named_parameters():
            if parameter.grad is not None:
                yield name, parameter.grad


def _replicas(gradient: Tensor, stage_ranks: int) -> int:
    """How many ranks hold this shard: of those outside the mesh every one has a mesh of its own like it."""
    if not isinstance(gradient, DTensor):
        return stage_ranks
    mesh = gradient.device_mesh
    assert not any(placement.is_partial() for placement in gradient.placements), "still to be reduced"
    copies = [
        mesh.size(axis) for axis, placement in enumerate(gradient.placements) if placement.is_replicate()
    ]
    return stage_ranks // mesh.size() * math.prod(copies)


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
