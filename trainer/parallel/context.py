"""Context parallelism: the ranks of axis cp share the positions of a pack, those of cp and tp its pictures.

Positions are cut into 2 * cp chunks, and rank r computes chunks r and 2 * cp - 1 - r: under a causal mask the
first has little to do and the last much, so all have the same. Keys and values of all ranks are gathered in
every layer; a mask over (document, position) decides who sees whom, whatever order they stand in. (Ring
attention, and torch's own context parallelism, have no mask for packed documents.)

    rank 0 of 2   | 0 |   |   | 3 |      queries
    rank 1 of 2   |   | 1 | 2 |   |
    both          | 0 | 3 | 1 | 2 |      keys and values, in gathered order

A gather sends gradients back as it must: each rank gets the sum of what all ranks have for its part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.attention import KeyOrder


def position_chunks(length: int, cp_size: int) -> Tensor:
    """Positions of each rank, int64 [cp, S / cp].

    Raises:
        ValueError: the length cannot be divided.
    """
    if length % (2 * cp_size):
        raise ValueError(f"S = {length} is no multiple of 2 x cp = {2 * cp_size}")
    chunks = torch.arange(length).view(2 * cp_size, -1)
    return torch.stack([torch.cat([chunks[r], chunks[2 * cp_size - 1 - r]]) for r in range(cp_size)])


class SequencePart:
    """The positions that this rank computes, and the exchange of keys and values with the others."""

    def __init__(self, length: int, rank: int, group: dist.ProcessGroup, device: torch.device) -> None:
        positions = position_chunks(length, group.size()).to(device)
        self.group = group
        self.order = KeyOrder(query_S=positions[rank], key_S=positions.flatten())

    def take(self, x_BS: Tensor) -> Tensor:
        """This rank's positions of a tensor over all."""
        return x_BS[:, self.order.query_S]

    def exchange(self, k_BSHK: Tensor, v_BSHK: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all positions, in the order of `order.key_S`."""
        both = gather(torch.cat([k_BSHK, v_BSHK], dim=-1), 1, self.group)
        k_BSHK, v_BSHK = both.chunk(2, dim=-1)
        return k_BSHK, v_BSHK


def gather_rows(group: dist.ProcessGroup) -> Callable[[Tensor], Tensor]:
    """Visual tokens of the vision rows of all ranks of `group` from those of each: [v, D] -> [v * ranks, D]."""
    return lambda visual_vD: gather(visual_vD, 0, group)


def gather(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Parts of all ranks side by side along `dim`; backward sums the ranks' gradients of each part."""
    return _Gather.apply(x, dim, group)  # pyright: ignore[reportReturnType]  # apply is untyped


# Their names since torch 2.13, and before it.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor")  # noqa: B009
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor")  # noqa: B009


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        parts = x.new_empty((group.size(), *x.shape))
        _all_gather(parts.flatten(0, 1), x.contiguous(), group=group)
        return parts.movedim(0, dim).flatten(dim, dim + 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        size = ctx.group.size()
        parts = gradients[0].unflatten(ctx.dim, (size, -1)).movedim(ctx.dim, 0).contiguous()
        own = torch.empty_like(parts[0])
        _reduce_scatter(own, parts.flatten(0, 1), group=ctx.group)
        return own, None, None
