"""SigLIP2 NaFlex vision encoder (arXiv:2502.14786): pictures of any size and aspect ratio, packed in rows.

    uint8 patches --normalize--> float --patch embedding--> + positions --layers--> layer norm --> z_NLE

Here N counts the rows of the whole microbatch (B*N rows of L patches). A row holds several images; what
belongs together is told by integers per patch: its place (t, h, w) in its image, the size (h, w) of that
image, and the mask. Everything derived from them is computed here in float32, because a wrapper that runs
the model in bfloat16 would round floats on their way in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from shared.config import require_at_least
from shared.geometry import CHANNELS
from trainer.attention import attention


@dataclass(frozen=True, kw_only=True, slots=True)
class Siglip2Config:
    """Sizes of the encoder. The defaults are SigLIP2 base, patch 16, NaFlex."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    patch_size: int = 16
    temporal_patch_size: int = 1
    # Side of the square table of learned positions: 16 x 16 in every published NaFlex checkpoint.
    position_grid: int = 16
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        require_at_least(self, 1, "hidden_size", "intermediate_size", "num_layers", "num_heads")
        require_at_least(self, 1, "patch_size", "temporal_patch_size", "position_grid")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of num_heads {self.num_heads}")
        if self.layer_norm_eps <= 0:
            raise ValueError(f"layer_norm_eps must be above 0, got {self.layer_norm_eps}")

    @property
    def head_dim(self) -> int:
        """K."""
        return self.hidden_size // self.num_heads

    @property
    def values_per_patch(self) -> int:
        """P."""
        return self.temporal_patch_size * self.patch_size**2 * CHANNELS


class Siglip2Encoder(nn.Module):
    """Patches to features. `pixel_mean` and `pixel_std` belong to the data set, on the scale of 0 to 1."""

    def __init__(
        self, config: Siglip2Config, pixel_mean: Sequence[float], pixel_std: Sequence[float]
    ) -> None:
        super().__init__()
        self.pixel_mean, self.pixel_std = tuple(pixel_mean), tuple(pixel_std)
        self.patch_embedding = nn.Linear(config.values_per_patch, config.hidden_size)
        self.position_embedding = PositionEmbedding(config.position_grid, config.hidden_size)
        self.layers = nn.ModuleDict({str(i): EncoderLayer(config) for i in range(config.num_layers)})
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, pixel_values_NLP: Tensor, grid_thw_NL3: Tensor, image_sizes_NL2: Tensor, mask_N1LL: Tensor
    ) -> Tensor:
        """z_NLE in the dtype of the weights; what it holds at padding has no meaning, but is finite."""
        x_NLP = normalize_pixels(pixel_values_NLP, self.pixel_mean, self.pixel_std)
        z_NLE = self.patch_embedding(x_NLP.to(self.patch_embedding.weight.dtype))
        z_NLE = z_NLE + self.position_embedding(grid_thw_NL3, image_sizes_NL2).to(z_NLE.dtype)
        for layer in self.layers.values():
            z_NLE = layer(z_NLE, mask_N1LL)
        return self.post_layernorm(z_NLE)


class EncoderLayer(nn.Module):
    def __init__(self, config: Siglip2Config) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = EncoderAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = EncoderMLP(config)

    def forward(self, z_NLE: Tensor, mask_N1LL: Tensor) -> Tensor:
        z_NLE = z_NLE + self.self_attn(self.layer_norm1(z_NLE), mask_N1LL)
        return z_NLE + self.mlp(self.layer_norm2(z_NLE))


class EncoderAttention(nn.Module):
    def __init__(self, config: Siglip2Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, z_NLE: Tensor, mask_N1LL: Tensor) -> Tensor:
        q_NLHK, k_NLHK, v_NLHK = (
            projection(z_NLE).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(attention(q_NLHK, k_NLHK, v_NLHK, mask_N1LL).flatten(2))


class EncoderMLP(nn.Module):
    def __init__(self, config: Siglip2Config) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, z_NLE: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(z_NLE), approximate="tanh"))


class PositionEmbedding(nn.Module):
    """A G x G table of learned positions, resized to each image's own grid.

    Bilinear resizing with antialiasing is linear in the table and separable, so the position of a patch is
    two vectors of G weights, one for its row and one for its column. No image is visited on its own.
    """

    def __init__(self, grid: int, hidden_size: int) -> None:
        super().__init__()
        self.grid = grid
        self.weight = nn.Parameter(torch.empty(grid * grid, hidden_size))

    def forward(self, grid_thw_NL3: Tensor, image_sizes_NL2: Tensor) -> Tensor:
        """float32 [N, L, E]."""
        rows_NLG = resize_weights(grid_thw_NL3[..., 1], image_sizes_NL2[..., 0], self.grid)
        columns_NLG = resize_weights(grid_thw_NL3[..., 2], image_sizes_NL2[..., 1], self.grid)
        # Contracting one axis of the table first would hold G*E floats per patch; the outer product of the
        # weights holds G*G, and G is far below E.
        weights = (rows_NLG[..., :, None] * columns_NLG[..., None, :]).flatten(-2)
        return weights @ self.weight.float()


def resize_weights(index: Tensor, length: Tensor, grid: int) -> Tensor:
    """Weights of the `grid` table entries in sample `index` of `length` samples: float32 [..., G], sum 1.

    What `interpolate(mode="bilinear", antialias=True, align_corners=False)` does along one axis: a triangle
    around the sample's centre, one table entry wide when it enlarges and one sample wide when it shrinks.
    `index` and `length` are integers, -1 at padding (which gets the weights of the first of one sample).

    Twice the distance from sample i of n to entry j of G, in units of 1/(n*G), is the integer
    |n(2j+1) - G(2i+1)|, and the triangle ends at 2*max(n, G): a weight is a quotient of two integers.
    """
    index, length = index.clamp(min=0).unsqueeze(-1), length.clamp(min=1).unsqueeze(-1)
    entry_G = torch.arange(grid, device=index.device, dtype=index.dtype)
    distance = (length * (2 * entry_G + 1) - grid * (2 * index + 1)).abs()
    triangle = (2 * length.clamp(min=grid) - distance).clamp(min=0)
    return triangle / triangle.sum(dim=-1, keepdim=True)


def normalize_pixels(pixel_values: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [..., P] -> (x / 255 - mean) / std in float32; the channel is the fastest index inside P."""
    x = pixel_values.float().unflatten(-1, (-1, CHANNELS)) / 255
    # Filled on the device: a tensor made from a list would be copied there and wait for the device.
    mean_c, std_c = (
        torch.stack([torch.full((), value, device=x.device) for value in channel]) for channel in (mean, std)
    )
    return ((x - mean_c) / std_c).flatten(-2)
