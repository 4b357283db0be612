"""Decoder of Llama 3 (arXiv:2407.21783) or Qwen3 (arXiv:2505.09388), one document-causal pack per row.

    embed_tokens -> h_BSD -> layers -> norm -> h_BSD;  logits = h_BSD @ head_weight.T  (see trainer.loss)

RMSNorm, grouped-query attention, rotary positions, SwiGLU, tied or untied head; Qwen3 also normalizes each
head of queries and keys. Positions restart at 0 in every document of a pack. `embed_tokens`, layers, `norm`
and `lm_head` may be missing: a pipeline stage holds only its own, and `norm` is None wherever the head is
elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from shared.config import require_above_zero, require_at_least
from trainer.attention import Mask, attention
from trainer.models.layers import GatedMLP, Rotation, rotate, rotation_of
from trainer.models.presets import DECODERS


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScalingConfig:
    """Llama 3.1's stretch of the slow rotations, for contexts beyond the first training's. Factor 1: none."""

    factor: float
    """What the slowest rotations are slowed by."""
    low_freq_factor: float = 1.0
    """Rotations that turn less often than this in the original context are slowed by all of `factor`."""
    high_freq_factor: float = 4.0
    """Those that turn more often than this are kept; between the two the change is gradual."""
    original_max_positions: int = 8192
    """Tokens of the original context."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "factor", "original_max_positions")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                "low_freq_factor must lie between 0 and high_freq_factor, got "
                f"{self.low_freq_factor} and {self.high_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """Sizes of the decoder. The defaults are Llama 3.2 1B, without its RoPE scaling."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = DECODERS

    type: Literal["llama", "qwen3"] = "llama"
    """qwen3 normalizes queries and keys per head."""
    vocab_size: int = 128256
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_layers: int = 16
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 64
    """K; num_heads * head_dim need not be hidden_size."""
    rope_theta: float = 500000.0
    rope_scaling: RopeScalingConfig | None = None
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = True
    """One table for input and output tokens."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "vocab_size", "hidden_size", "intermediate_size", "num_layers")
        require_at_least(self, 1, "num_heads", "num_kv_heads", "head_dim")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: rotary positions turn pairs")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}")
        require_above_zero(self, "rope_theta", "rms_norm_eps")


class Decoder(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        self.rope_scaling = config.rope_scaling
        self.embed_tokens: nn.Embedding | None = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict({str(i): DecoderLayer(config) for i in range(config.num_layers)})
        self.norm: nn.RMSNorm | None = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # Tied: the head is the embedding itself, one parameter under one name.
        tied = config.tie_embeddings
        self.lm_head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, h_BSD: Tensor, positions_BS: Tensor, mask: Mask) -> Tensor:
        """`mask` is what `trainer.attention` made for this batch, and means nothing here."""
        # Computed in every forward: a buffer would be garbage after `to_empty`, and costs more to keep right.
        frequency_k = rotary_frequencies(
            self.head_dim, self.rope_theta, self.rope_scaling, positions_BS.device
        )
        rotation = rotation_of(positions_BS[..., None].float() * frequency_k)
        for layer in self.layers.values():
            h_BSD = layer(h_BSD, rotation, mask)
        return h_BSD if self.norm is None else self.norm(h_BSD)

    @property
    def head_weight(self) -> Tensor:
        """[V, D]."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        assert head is not None, "this stage has no head"
        return head.weight


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = DecoderAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)

    def forward(self, h_BSD: Tensor, rotation: Rotation, mask: Mask) -> Tensor:
        h_BSD = h_BSD + self.self_attn(self.input_layernorm(h_BSD), rotation, mask)
        return h_BSD + self.mlp(self.post_attention_layernorm(h_BSD))


def keep(k_BSHK: Tensor, v_BSHK: Tensor) -> tuple[Tensor, Tensor]:
    return k_BSHK, v_BSHK


class DecoderAttention(nn.Module):
    """`exchange` gives keys and values to attend to for those of this rank; all are here by default."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.exchange: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = keep
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        normed = config.type == "qwen3"
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps) if normed else None
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps) if normed else None

    def forward(self, h_BSD: Tensor, rotation: Rotation, mask: Mask) -> Tensor:
        # -1, not the number of heads: a tensor-parallel rank holds some of them.
        q_BSHK, k_BSHK, v_BSHK = (
            projection(h_BSD).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHK, k_BSHK = self.q_norm(q_BSHK), self.k_norm(k_BSHK)
        q_BSHK, k_BSHK = rotate(q_BSHK, rotation), rotate(k_BSHK, rotation)
        k_BSHK, v_BSHK = self.exchange(k_BSHK, v_BSHK)
        return self.o_proj(attention(q_BSHK, k_BSHK, v_BSHK, mask).flatten(2))


def rotary_frequencies(
    head_dim: int, theta: float, scaling: RopeScalingConfig | None, device: torch.device
) -> Tensor:
    """Radians per position of each pair of a head, float32 [K/2].

    Rounded as transformers rounds it: at position 8000 one unit in the last place is 5e-4 radians.
    """
    exponent_k = torch.arange(0, head_dim, 2, device=device).float() / head_dim
    frequency_k = 1.0 / theta**exponent_k
    if scaling is None:
        return frequency_k
    turns_k = scaling.original_max_positions * frequency_k / (2 * math.pi)
    kept_k = (turns_k - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept_k = kept_k.clamp(0, 1)
    return (1 - kept_k) * (frequency_k / scaling.factor) + kept_k * frequency_k
