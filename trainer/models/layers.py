"""Blocks that decoders and encoders share: rotation by position, and the gated MLP."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

Rotation = tuple[Tensor, Tensor]
"""cos and sin of every angle, float32 [B, S, 1, K]; the second half of K repeats the first."""


def rotation_of(angles_BSk: Tensor) -> Rotation:
    """Angles of the K/2 pairs of a head, float32 [B, S, K/2], as `rotate` wants them."""
    angles = torch.cat([angles_BSk, angles_BSk], dim=-1).unsqueeze(2)
    return angles.cos(), angles.sin()


def rotate(x_BSHK: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair (k, k + K/2) by its angle, in float32."""
    cos, sin = rotation
    x = x_BSHK.float()
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x_BSHK.dtype)


class GatedMLP(nn.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, h_BSD: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(h_BSD)) * self.up_proj(h_BSD))
