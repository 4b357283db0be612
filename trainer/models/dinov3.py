"""DINOv3 vision encoder (arXiv:2508.10104): rotary positions, layer scale, a class token and registers.

Queries and keys of a patch are turned by its place in the picture, scaled to -1 .. 1 on both axes, so that a
picture of any size covers the same angles. (The random rescaling of these places in DINOv3's own training is
not done.) Each frame has a class token and R registers, which its patches attend to. How many frames a row
holds is known on the device alone, so every row has slots for `frames_per_row` of them:

    slots of frame 0, patches of frame 0, slots of frame 1, patches of frame 1, .., slots left over, padding

Slots left over are padding; what comes out is the patches alone, back in their places. A frame lies in one run
because attention by blocks or by ranges of a row then skips all others.
The contract of encoders, and what they share, is in `trainer.models.vision`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from shared.config import require_above_zero, require_at_least
from trainer.attention import Mask, attention
from trainer.models.layers import GatedMLP, Rotation, rotate, rotation_of
from trainer.models.presets import DINOV3
from trainer.models.vision import EncoderSizes, PatchEmbedding


@dataclass(frozen=True, kw_only=True, slots=True)
class Dinov3Config(EncoderSizes):
    """Sizes of the encoder. The defaults are DINOv3 ViT-B, patch 16."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = DINOV3

    type: Literal["dinov3"] = "dinov3"
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    patch_size: int = 16
    num_registers: int = 4
    """R"""
    gated_mlp: bool = False
    frames_per_row: int = 16
    """Most frames (pictures, or frames of a video) in a vision row; each costs 1 + R slots, used or not."""
    rope_theta: float = 100.0
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        EncoderSizes.__post_init__(self)
        require_at_least(self, 1, "num_registers", "frames_per_row")
        require_above_zero(self, "rope_theta", "layer_norm_eps")
        if self.head_dim % 4:
            raise ValueError(
                f"hidden_size / num_heads is {self.head_dim}, which must be a multiple of 4: rotary positions "
                "turn pairs, half of them by the row and half by the column"
            )


class Dinov3Encoder(nn.Module):
    def __init__(self, config: Dinov3Config, pixel_mean: Sequence[float], pixel_std: Sequence[float]) -> None:
        super().__init__()
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        self.frames_per_row, self.slots_per_frame = config.frames_per_row, 1 + config.num_registers
        self.patch_embedding = PatchEmbedding(config, pixel_mean, pixel_std)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.register_tokens = nn.Parameter(torch.empty(1, config.num_registers, config.hidden_size))
        self.layers = nn.ModuleDict({str(i): Dinov3Layer(config) for i in range(config.num_layers)})
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def attention_segments(self, segments_NL: Tensor) -> Tensor:
        """Slots and patches in the order in which the layers see them: [N, frames_per_row * (1 + R) + L]."""
        segments_NX = self._slots_before_patches(segments_NL)
        return segments_NX.gather(1, frame_order(segments_NX))

    def forward(
        self,
        pixel_values_NLP: Tensor,
        grid_thw_NL3: Tensor,
        image_sizes_NL2: Tensor,
        segments_NL: Tensor,
        mask: Mask,
    ) -> Tensor:
        order_NX = frame_order(self._slots_before_patches(segments_NL))
        z_NLE = self.patch_embedding(pixel_values_NLP)
        slots_NxE = torch.cat([self.cls_token, self.register_tokens], dim=1).to(z_NLE.dtype)
        slots_NxE = slots_NxE.repeat(z_NLE.shape[0], self.frames_per_row, 1)
        z_NXE = take(torch.cat([slots_NxE, z_NLE], dim=1), order_NX)
        angles_NLk = place_angles(grid_thw_NL3, image_sizes_NL2, self.head_dim, self.rope_theta)
        still_Nxk = angles_NLk.new_zeros(*slots_NxE.shape[:2], angles_NLk.shape[-1])
        rotation = rotation_of(take(torch.cat([still_Nxk, angles_NLk], dim=1), order_NX))
        for layer in self.layers.values():
            z_NXE = layer(z_NXE, rotation, mask)
        places_NX = order_NX.argsort(dim=1)
        return self.norm(take(z_NXE, places_NX[:, slots_NxE.shape[1] :]))

    def _slots_before_patches(self, segments_NL: Tensor) -> Tensor:
        """The frame of every slot, then of every patch; -1 for padding."""
        frame_f = torch.arange(self.frames_per_row, device=segments_NL.device, dtype=segments_NL.dtype)
        last_N1 = segments_NL.amax(dim=1, keepdim=True)
        slots_Nx = torch.where(frame_f <= last_N1, frame_f, -1).repeat_interleave(self.slots_per_frame, dim=1)
        return torch.cat([slots_Nx, segments_NL], dim=1)


def frame_order(segments_NX: Tensor) -> Tensor:
    """Where each place of the row takes its entry from, so that frames follow each other, padding last."""
    last = torch.iinfo(segments_NX.dtype).max
    return torch.where(segments_NX < 0, last, segments_NX).argsort(dim=1, stable=True)


def take(x_NXE: Tensor, index_NL: Tensor) -> Tensor:
    """Entries `index_NL` of each row."""
    return x_NXE.gather(1, index_NL[..., None].expand(-1, -1, x_NXE.shape[-1]))


def place_angles(grid_thw_NL3: Tensor, image_sizes_NL2: Tensor, head_dim: int, theta: float) -> Tensor:
    """Radians by which the pairs of a head are turned, float32 [N, L, K/2]: K/4 for the row, then the column."""
    place_NL2 = 2 * (grid_thw_NL3[..., 1:].float() + 0.5) / image_sizes_NL2.clamp(min=1) - 1
    frequency_k = 1 / theta ** torch.arange(0, 1, 4 / head_dim, device=place_NL2.device)
    return (2 * math.pi * place_NL2[..., None] * frequency_k).flatten(-2)


class Dinov3Layer(nn.Module):
    def __init__(self, config: Dinov3Config) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Dinov3Attention(config)
        self.layer_scale1 = LayerScale(config.hidden_size)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        mlp = GatedMLP if config.gated_mlp else Dinov3MLP
        self.mlp = mlp(config.hidden_size, config.intermediate_size, bias=True)
        self.layer_scale2 = LayerScale(config.hidden_size)

    def forward(self, z_NXE: Tensor, rotation: Rotation, mask: Mask) -> Tensor:
        z_NXE = z_NXE + self.layer_scale1(self.attention(self.norm1(z_NXE), rotation, mask))
        return z_NXE + self.layer_scale2(self.mlp(self.norm2(z_NXE)))


class Dinov3Attention(nn.Module):
    def __init__(self, config: Dinov3Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        # The published models mask the bias of their keys to zero.
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, z_NXE: Tensor, rotation: Rotation, mask: Mask) -> Tensor:
        q_NXHK, k_NXHK, v_NXHK = (
            projection(z_NXE).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_NXHK, k_NXHK = rotate(q_NXHK, rotation), rotate(k_NXHK, rotation)
        return self.o_proj(attention(q_NXHK, k_NXHK, v_NXHK, mask).flatten(2))


class Dinov3MLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, z_NXE: Tensor) -> Tensor:
        return self.down_proj(gelu(self.up_proj(z_NXE)))


class LayerScale(nn.Module):
    """One factor per feature, on what a block adds."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.empty(hidden_size))

    def forward(self, z_NXE: Tensor) -> Tensor:
        return z_NXE * self.lambda1
