"""What a step takes of a GPU's memory, by the model of [cost] and [memory]: an estimate to choose S by.

states        float32 weights, gradients, two moments of Adam: 16 bytes per parameter over all shards
gathered      two layers in bfloat16 with their gradients, as FSDP holds them
activations   34 bytes per token, layer and width (Korthikanti et al. 2022, arXiv:2205.05198, without the quadratic
              part, which flash attention does not keep); 2 where layers are computed again, and one layer whole
loss          logits exist a chunk at a time
"""

from __future__ import annotations

from preprocess.budgets import MemoryConfig
from preprocess.config import CostConfig
from shared.errors import UserError
from shared.geometry import Budget

STATE_BYTES = 16
GATHERED_BYTES = 4
GATHERED_LAYERS = 2
KEPT, RECOMPUTED = 34, 2
# Chunks of logits and their gradient.
LOSS_BYTES = 500_000_000
# S is a multiple of this.
TOKENS = 256
# N * L may lie this far above what S tokens bring along.
ROOM = 1.1


def pack_memory(budget: Budget, memory: MemoryConfig, cost: CostConfig) -> int:
    """Bytes that a rank takes while it trains on packs of this budget."""
    per_token, per_patch = _activation_bytes(memory, cost)
    activations = budget.S * per_token + budget.N * budget.L * per_patch
    return _fixed_bytes(memory, cost) + memory.packs_per_microbatch * activations


def fitting_tokens(
    memory: MemoryConfig, cost: CostConfig, patches_per_token: float, least_patches: int
) -> tuple[int, int]:
    """The most tokens per pack that leave room for their patches, and the patches that fit beside them.

    `least_patches`: N * L is no less, however few come along.

    Raises:
        UserError: the model and these patches alone fill the GPU.
    """
    free = int(memory.gpu_bytes * (1 - memory.reserve)) - _fixed_bytes(memory, cost)
    per_token, per_patch = _activation_bytes(memory, cost)
    per_pack = free / memory.packs_per_microbatch
    spread = per_token + ROOM * patches_per_token * per_patch
    beside = max(0.0, per_pack - least_patches * per_patch)
    S = int(min(per_pack / spread, beside / per_token)) // TOKENS * TOKENS if per_token else 0
    if S < TOKENS:
        raise UserError(
            f"budget.S: of {memory.gpu_bytes / 1e9:.1f} GB weights and optimizer leave {max(0, free) / 1e9:.1f} GB, "
            f"not enough for {memory.packs_per_microbatch} x {TOKENS} tokens and {least_patches} patches; raise "
            "memory.shards or memory.gpu_bytes, set memory.recompute to full, or lower N or L"
        )
    left = per_pack - S * per_token
    return S, int(left / per_patch) if per_patch else 2**31


def _fixed_bytes(memory: MemoryConfig, cost: CostConfig) -> int:
    parameters = cost.decoder_parameters + cost.encoder_parameters
    layer = max(
        cost.decoder_parameters // max(1, cost.decoder_layers),
        cost.encoder_parameters // max(1, cost.encoder_layers),
    )
    states = STATE_BYTES * parameters // memory.shards
    return states + GATHERED_LAYERS * GATHERED_BYTES * layer + LOSS_BYTES


def _activation_bytes(memory: MemoryConfig, cost: CostConfig) -> tuple[int, int]:
    """Per token and per patch of a pack."""

    def per_position(layers: int, width: int) -> int:
        if memory.recompute == "full":
            return (RECOMPUTED * layers + KEPT) * width
        return KEPT * layers * width

    return (
        per_position(cost.decoder_layers, cost.decoder_width),
        per_position(cost.encoder_layers, cost.encoder_width),
    )
