"""Sizes of published checkpoints, by the names that their publishers gave them.

`preset = "NAME"` in [encoder] or [decoder] puts these values under the keys that the file writes
(see shared.config). They are the values of the `config.json` published with each checkpoint; the tests build
the same sizes in transformers and compare the numbers of parameters.
"""

from __future__ import annotations

from typing import Any


def llama(
    hidden: int, intermediate: int, layers: int, heads: int, head_dim: int, **rest: Any
) -> dict[str, Any]:
    """Llama 3.1 stretches the rotations of an 8192-token model by 8, Llama 3.2 by 32."""
    return {
        "type": "llama",
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": 8,
        "head_dim": head_dim,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_positions": 8192,
        },
        "rms_norm_eps": 1e-5,
        "tie_embeddings": True,
        **rest,
    }


def qwen3(hidden: int, intermediate: int, layers: int, heads: int, *, tied: bool) -> dict[str, Any]:
    return {
        "type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": 8,
        "head_dim": 128,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_embeddings": tied,
    }


def vision(
    hidden: int, intermediate: int, layers: int, heads: int, patch: int, **rest: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_layers": layers,
        "num_heads": heads,
        "patch_size": patch,
        **rest,
    }


DECODERS = {
    "llama-3.2-1b": llama(2048, 8192, 16, 32, 64),
    "llama-3.2-3b": llama(3072, 8192, 28, 24, 128),
    "llama-3.1-8b": llama(
        4096,
        14336,
        32,
        32,
        128,
        rope_scaling={
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_positions": 8192,
        },
        tie_embeddings=False,
    ),
    "qwen3-0.6b": qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": qwen3(4096, 12288, 36, 32, tied=False),
}

SIGLIP2 = {
    "siglip2-base-patch16-naflex": vision(768, 3072, 12, 12, 16, type="siglip2", position_grid=16),
    "siglip2-so400m-patch16-naflex": vision(1152, 4304, 27, 16, 16, type="siglip2", position_grid=16),
}

# Native resolution was published for the large model only; the others have a table of learned positions, here
# resized to each picture as SigLIP2 resizes its own.
AIMV2 = {
    "aimv2-large-patch14-native": vision(1024, 2816, 24, 8, 14, type="aimv2", positions="sincos"),
    "aimv2-large-patch14-224": vision(
        1024, 2816, 24, 8, 14, type="aimv2", positions="learned", position_grid=16
    ),
    "aimv2-huge-patch14-224": vision(
        1536, 4096, 24, 12, 14, type="aimv2", positions="learned", position_grid=16
    ),
}

DINOV3 = {
    "dinov3-vits16": vision(384, 1536, 12, 6, 16, type="dinov3", gated_mlp=False),
    "dinov3-vitb16": vision(768, 3072, 12, 12, 16, type="dinov3", gated_mlp=False),
    "dinov3-vitl16": vision(1024, 4096, 24, 16, 16, type="dinov3", gated_mlp=False),
    "dinov3-vith16plus": vision(1280, 5120, 32, 20, 16, type="dinov3", gated_mlp=True),
}
