"""Initial weights: a function of (seed, parameter name, shape) alone.

Every parallel layout, and every subset of layers, starts from the same numbers. Each rank draws the whole
tensor on the CPU and keeps its part: about 10 ns per value, 30 s for three billion.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from trainer.models.vlm import ModelConfig
from trainer.shards import local_part

# What adds to the residual stream: scaled down with depth, so that its variance does not grow (GPT-2).
RESIDUAL_OUTPUTS = (".out_proj", ".o_proj", ".fc2", ".down_proj")
# Tables of tokens, and the tokens that an encoder adds to every picture.
TOKEN_TABLES = ("embed_tokens", "lm_head", "cls_token", "register_tokens")
TOKEN_STD = 0.02  # GPT-2 and every Llama since


@torch.no_grad()
def init_parameters(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill all parameters in place, sharded or not, on any device."""
    depth = {"encoder": config.encoder.num_layers, "decoder": config.decoder.num_layers}
    for name, parameter in model.named_parameters():
        part = name.partition(".")[0]
        full = initial_value(name, parameter.shape, num_layers=depth.get(part, 1), seed=seed)
        local, box = local_part(parameter)
        local.copy_(full[box])


def initial_value(name: str, shape: torch.Size, *, num_layers: int, seed: int) -> Tensor:
    """float32 on the CPU. Weights that multiply: N(0, 1/fan_in); tables: N(0, 0.02^2) or N(0, 1/E)."""
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)  # norms; layer scales, as in the published configs of DINOv3
    module = name.removesuffix(".weight")
    std = TOKEN_STD if module.endswith(TOKEN_TABLES) else 1 / math.sqrt(shape[-1])
    if module.endswith(RESIDUAL_OUTPUTS):
        std /= math.sqrt(2 * num_layers)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator).mul_(std)
