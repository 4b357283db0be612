"""SigLIP2 NaFlex vision encoder (arXiv:2502.14786): a table of learned positions, resized to each picture.

The contract of encoders, and what they share, is in `trainer.models.vision`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.nn.functional import gelu

from shared.config import require_above_zero, require_at_least
from trainer.attention import Mask
from trainer.models.presets import SIGLIP2
from trainer.models.vision import (
    EncoderAttention,
    EncoderSizes,
    PatchEmbedding,
    PositionEmbedding,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Siglip2Config(EncoderSizes):
    """Sizes of the encoder. The defaults are SigLIP2 base, patch 16, NaFlex."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = SIGLIP2
    frames_per_row: ClassVar[int | None] = None

    type: Literal["siglip2"] = "siglip2"
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    patch_size: int = 16
    position_grid: int = 16
    """Side of the square table of learned positions: 16 x 16 in every published NaFlex checkpoint."""
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        EncoderSizes.__post_init__(self)
        require_at_least(self, 1, "position_grid")
        require_above_zero(self, "layer_norm_eps")


class Siglip2Encoder(nn.Module):
    def __init__(
        self, config: Siglip2Config, pixel_mean: Sequence[float], pixel_std: Sequence[float]
    ) -> None:
        super().__init__()
        self.patch_embedding = PatchEmbedding(config, pixel_mean, pixel_std)
        self.position_embedding = PositionEmbedding(config.position_grid, config.hidden_size)
        self.layers = nn.ModuleDict({str(i): EncoderLayer(config) for i in range(config.num_layers)})
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

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
        z_NLE = self.patch_embedding(pixel_values_NLP)
        z_NLE = z_NLE + self.position_embedding(grid_thw_NL3, image_sizes_NL2).to(z_NLE.dtype)
        for layer in self.layers.values():
            z_NLE = layer(z_NLE, mask)
        return self.post_layernorm(z_NLE)


class EncoderLayer(nn.Module):
    def __init__(self, config: Siglip2Config) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = EncoderAttention(config, bias=True)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = EncoderMLP(config)

    def forward(self, z_NLE: Tensor, mask: Mask) -> Tensor:
        z_NLE = z_NLE + self.self_attn(self.layer_norm1(z_NLE), mask)
        return z_NLE + self.mlp(self.layer_norm2(z_NLE))


class EncoderMLP(nn.Module):
    def __init__(self, config: Siglip2Config) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, z_NLE: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(z_NLE), approximate="tanh"))
