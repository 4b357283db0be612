"""What the vision encoders share: their contract, and the parts that are the same in several.

    uint8 patches --normalize--> float --patch embedding--> + positions --layers--> norm --> z_NLE

    encoder(pixel_values_NLP, grid_thw_NL3, image_sizes_NL2, segments_NL, mask) -> z_NLE

Here N counts the rows of the whole microbatch (B*N rows of L patches). A row holds several pictures of any
size and aspect ratio; what belongs together is told by integers per patch: its place (t, h, w) in its image,
the size (h, w) of that image, and the number of its frame in the row (`frame_segments`). Everything derived
from them is computed in the encoder in float32, because a wrapper that runs the model in bfloat16 would round
floats on their way in. The mask is made by `trainer.attention` from `encoder.attention_segments(segments_NL)`:
patches of one frame see each other. z_NLE has the dtype of the weights; what it holds at padding has no
meaning, but is finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from shared.config import require_at_least
from shared.geometry import CHANNELS
from trainer.attention import Mask, attention


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderSizes:
    """Sizes that every encoder has. `frames_per_row` of an encoder: most frames in a vision row, or None."""

    type: str
    hidden_size: int
    """E"""
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int
    temporal_patch_size: int = 1

    def __post_init__(self) -> None:
        require_at_least(self, 1, "hidden_size", "intermediate_size", "num_layers", "num_heads")
        require_at_least(self, 1, "patch_size", "temporal_patch_size")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of num_heads {self.num_heads}")

    @property
    def head_dim(self) -> int:
        """K."""
        return self.hidden_size // self.num_heads

    @property
    def values_per_patch(self) -> int:
        """P."""
        return self.temporal_patch_size * self.patch_size**2 * CHANNELS


def frame_segments(image_ids_NL: Tensor, grid_thw_NL3: Tensor) -> Tensor:
    """Number of each patch's frame in its row, counted 0, 1, .. along the row; -1 at padding. int32 [N, L]."""
    frame_NL2 = torch.stack([image_ids_NL, grid_thw_NL3[..., 0]], dim=-1)
    begins_NL = pad((frame_NL2[:, 1:] != frame_NL2[:, :-1]).any(dim=-1), (1, 0), value=True)
    real_NL = image_ids_NL >= 0
    number_NL = (begins_NL & real_NL).cumsum(dim=1) - 1
    return torch.where(real_NL, number_NL, -1).to(torch.int32)


class PatchEmbedding(nn.Linear):
    """Pixels to features. `mean` and `std` belong to the data set, on the scale of 0 to 1."""

    def __init__(self, config: EncoderSizes, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(config.values_per_patch, config.hidden_size)
        self.mean, self.std = tuple(mean), tuple(std)

    def forward(self, input: Tensor) -> Tensor:
        """uint8 [N, L, P] -> [N, L, E] in the dtype of the weights."""
        x_NLP = normalize_pixels(input, self.mean, self.std)
        return super().forward(x_NLP.to(self.weight.dtype))


def normalize_pixels(pixel_values: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [..., P] -> (x / 255 - mean) / std in float32; the channel is the fastest index inside P."""
    x = pixel_values.float().unflatten(-1, (-1, CHANNELS)) / 255
    # Filled on the device: a tensor made from a list would be copied there and wait for the device.
    mean_c, std_c = (
        torch.stack([torch.full((), value, device=x.device) for value in channel]) for channel in (mean, std)
    )
    return ((x - mean_c) / std_c).flatten(-2)


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


class EncoderAttention(nn.Module):
    """Attention without rotation, of SigLIP2 and AIMv2."""

    def __init__(self, config: EncoderSizes, *, bias: bool) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=bias)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=bias)

    def forward(self, z_NLE: Tensor, mask: Mask) -> Tensor:
        q_NLHK, k_NLHK, v_NLHK = (
            projection(z_NLE).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(attention(q_NLHK, k_NLHK, v_NLHK, mask).flatten(2))
