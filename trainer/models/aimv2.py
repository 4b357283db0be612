"""AIMv2 vision encoder (arXiv:2411.14402): RMSNorm, SwiGLU, no biases in the layers.

The model published for native resolution has sine and cosine positions of the patch's place. The others have
a table of learned positions for pictures of one size; here it is resized to each picture, as SigLIP2's is.
The contract of encoders, and what they share, is in `trainer.models.vision`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from shared.config import require_above_zero, require_at_least
from trainer.attention import Mask
from trainer.models.layers import GatedMLP
from trainer.models.presets import AIMV2
from trainer.models.vision import (
    EncoderAttention,
    EncoderSizes,
    PatchEmbedding,
    PositionEmbedding,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Aimv2Config(EncoderSizes):
    """Sizes of the encoder. The defaults are AIMv2 large, patch 14, native resolution."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = AIMV2
    frames_per_row: ClassVar[int | None] = None

    type: Literal["aimv2"] = "aimv2"
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_layers: int = 24
    num_heads: int = 8
    patch_size: int = 14
    positions: Literal["sincos", "learned"] = "sincos"
    position_grid: int = 16
    """Side of the square table of learned positions: image size / patch size of a checkpoint, 224 / 14."""
    rms_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        EncoderSizes.__post_init__(self)
        require_at_least(self, 1, "position_grid")
        require_above_zero(self, "rms_norm_eps")
        if self.positions == "sincos" and self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 4 for sincos positions")


class Aimv2Encoder(nn.Module):
    def __init__(self, config: Aimv2Config, pixel_mean: Sequence[float], pixel_std: Sequence[float]) -> None:
        super().__init__()
        self.patch_embedding = PatchEmbedding(config, pixel_mean, pixel_std)
        self.patch_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        learned = config.positions == "learned"
        self.position_embedding = (
            PositionEmbedding(config.position_grid, config.hidden_size) if learned else None
        )
        self.layers = nn.ModuleDict({str(i): Aimv2Layer(config) for i in range(config.num_layers)})
        self.rms_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def attention_segments(self, segments_NL: Tensor) -> Tensor:
        return segments_NL

    def forward(
        self,
        pixel_values_NLP: Tensor,
        grid_thw_NL3: Tensor,
        image_sizes_NL2: Tensor,
        segments_NL: Tensor,
        mask: Mask,
    ) -> Tensor:
        z_NLE = self.patch_norm(self.patch_embedding(pixel_values_NLP))
        if self.position_embedding is None:
            position_NLE = sincos_positions(grid_thw_NL3, z_NLE.shape[-1])
        else:
            position_NLE = self.position_embedding(grid_thw_NL3, image_sizes_NL2)
        z_NLE = z_NLE + position_NLE.to(z_NLE.dtype)
        for layer in self.layers.values():
            z_NLE = layer(z_NLE, mask)
        return self.rms_norm(z_NLE)


class Aimv2Layer(nn.Module):
    def __init__(self, config: Aimv2Config) -> None:
        super().__init__()
        self.rms_norm1 = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = EncoderAttention(config, bias=False)
        self.rms_norm2 = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.ffn = GatedMLP(config.hidden_size, config.intermediate_size)

    def forward(self, z_NLE: Tensor, mask: Mask) -> Tensor:
        z_NLE = z_NLE + self.attention(self.rms_norm1(z_NLE), mask)
        return z_NLE + self.ffn(self.rms_norm2(z_NLE))


def sincos_positions(grid_thw_NL3: Tensor, width: int) -> Tensor:
    """float32 [N, L, E]: sine and cosine of the column at E/4 wavelengths, then of the row."""
    quarter = torch.arange(width // 4, device=grid_thw_NL3.device, dtype=torch.float64) / (width // 4)
    frequency = (10000.0**-quarter).float()
    row, column = (grid_thw_NL3[..., axis, None] * frequency for axis in (1, 2))
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=-1)
