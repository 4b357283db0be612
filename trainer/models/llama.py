"""Llama decoder: RMSNorm, grouped-query attention, rotary positions, SwiGLU, tied or untied head.

    embed_tokens -> h_BSD -> layers -> norm -> h_BSD;  logits = h_BSD @ head_weight.T  (see trainer.loss)

Positions restart at 0 in every document of a pack. `embed_tokens`, layers, `norm` and `lm_head` may be
missing: a pipeline stage holds only its own, and `norm` is None wherever the head is elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from shared.config import require_at_least
from trainer.attention import attention


@dataclass(frozen=True, kw_only=True, slots=True)
class LlamaConfig:
    """Sizes of the decoder. The defaults are Llama 3.2 1B, without its RoPE scaling."""

    vocab_size: int = 128256
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_layers: int = 16
    num_heads: int = 32
    num_kv_heads: int = 8
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        require_at_least(self, 1, "vocab_size", "hidden_size", "intermediate_size", "num_layers")
        require_at_least(self, 1, "num_heads", "num_kv_heads")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be an even multiple of num_heads {self.num_heads} "
                "(rotary positions turn pairs)"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}")
        for name in ("rope_theta", "rms_norm_eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")

    @property
    def head_dim(self) -> int:
        """K."""
        return self.hidden_size // self.num_heads


class LlamaDecoder(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        self.embed_tokens: nn.Embedding | None = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict({str(i): DecoderLayer(config) for i in range(config.num_layers)})
        self.norm: nn.RMSNorm | None = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # Tied: the head is the embedding itself, one parameter under one name.
        tied = config.tie_embeddings
        self.lm_head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, h_BSD: Tensor, positions_BS: Tensor, mask_B1SS: Tensor) -> Tensor:
        rotation = rotary_angles(positions_BS, self.head_dim, self.rope_theta)
        for layer in self.layers.values():
            h_BSD = layer(h_BSD, rotation, mask_B1SS)
        return h_BSD if self.norm is None else self.norm(h_BSD)

    @property
    def head_weight(self) -> Tensor:
        """[V, D]."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        assert head is not None, "this stage has no head"
        return head.weight


class DecoderLayer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = DecoderAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = DecoderMLP(config)

    def forward(self, h_BSD: Tensor, rotation: tuple[Tensor, Tensor], mask_B1SS: Tensor) -> Tensor:
        h_BSD = h_BSD + self.self_attn(self.input_layernorm(h_BSD), rotation, mask_B1SS)
        return h_BSD + self.mlp(self.post_attention_layernorm(h_BSD))


class DecoderAttention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width, kv_width = config.hidden_size, config.num_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, h_BSD: Tensor, rotation: tuple[Tensor, Tensor], mask_B1SS: Tensor) -> Tensor:
        # -1, not the number of heads: a tensor-parallel rank holds some of them.
        q_BSHK, k_BSHK, v_BSHK = (
            projection(h_BSD).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BSHK, k_BSHK = rotate(q_BSHK, *rotation), rotate(k_BSHK, *rotation)
        return self.o_proj(attention(q_BSHK, k_BSHK, v_BSHK, mask_B1SS).flatten(2))


class DecoderMLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, h_BSD: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(h_BSD)) * self.up_proj(h_BSD))


def rotary_angles(positions_BS: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, float32 [B, S, 1, K].

    Computed in every forward: a buffer would be garbage after `to_empty`, and costs more to keep right.
    """
    half = torch.arange(0, head_dim, 2, device=positions_BS.device, dtype=torch.float32)
    angle = positions_BS[:, :, None, None].float() * theta ** (-half / head_dim)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x_BSHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (k, k + K/2) by its angle, in float32."""
    x = x_BSHK.float()
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x_BSHK.dtype)
