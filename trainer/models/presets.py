"""Sizes of published checkpoints, by the names that their publishers gave them.

`preset = "NAME"` in [encoder] or [decoder] puts these values under the keys that the file writes
(see shared.config). They are the values of the `config.json` published with each checkpoint; the tests build
the same sizes in transformers and compare the numbers of parameters.
"""

from __future__ import annotations

from typing import Any


def sizes(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_layers": layers,
        "num_heads": heads,
    }


def stretched(factor: float) -> dict[str, Any]:
    """Rotations of a model trained on 8192 tokens, for `factor` times as many."""
    return {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_positions": 8192,
    }


LLAMA: dict[str, Any] = {
    "type": "llama",
    "vocab_size": 128256,
    "num_kv_heads": 8,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
}
LLAMA_32 = {**LLAMA, "rope_scaling": stretched(32.0), "tie_embeddings": True}
LLAMA_31 = {**LLAMA, "rope_scaling": stretched(8.0), "tie_embeddings": False}
QWEN3: dict[str, Any] = {
    "type": "qwen3",
    "vocab_size": 151936,
    "num_kv_heads": 8,
    "head_dim": 128,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
}

DECODERS = {
    "llama-3.2-1b": {**LLAMA_32, **sizes(2048, 8192, 16, 32), "head_dim": 64},
    "llama-3.2-3b": {**LLAMA_32, **sizes(3072, 8192, 28, 24), "head_dim": 128},
    "llama-3.1-8b": {**LLAMA_31, **sizes(4096, 14336, 32, 32), "head_dim": 128},
    "qwen3-0.6b": {**QWEN3, **sizes(1024, 3072, 28, 16), "tie_embeddings": True},
    "qwen3-1.7b": {**QWEN3, **sizes(2048, 6144, 28, 16), "tie_embeddings": True},
    "qwen3-4b": {**QWEN3, **sizes(2560, 9728, 36, 32), "tie_embeddings": True},
    "qwen3-8b": {**QWEN3, **sizes(4096, 12288, 36, 32), "tie_embeddings": False},
}

NAFLEX: dict[str, Any] = {"type": "siglip2", "patch_size": 16, "position_grid": 16, "layer_norm_eps": 1e-6}
SIGLIP2 = {
    "siglip2-base-patch16-naflex": {**NAFLEX, **sizes(768, 3072, 12, 12)},
    "siglip2-so400m-patch16-naflex": {**NAFLEX, **sizes(1152, 4304, 27, 16)},
}

# Native resolution was published for the large model only; the others have a table of learned positions, here
# resized to each picture as SigLIP2 resizes its own.
AIMV2_ALL: dict[str, Any] = {"type": "aimv2", "patch_size": 14, "rms_norm_eps": 1e-5}
AIMV2_224 = {**AIMV2_ALL, "positions": "learned", "position_grid": 16}
AIMV2 = {
    "aimv2-large-patch14-native": {**AIMV2_ALL, **sizes(1024, 2816, 24, 8), "positions": "sincos"},
    "aimv2-large-patch14-224": {**AIMV2_224, **sizes(1024, 2816, 24, 8)},
    "aimv2-huge-patch14-224": {**AIMV2_224, **sizes(1536, 4096, 24, 12)},
}

DINOV3_ALL: dict[str, Any] = {
    "type": "dinov3",
    "patch_size": 16,
    "num_registers": 4,
    "rope_theta": 100.0,
    "layer_norm_eps": 1e-5,
}
DINOV3 = {
    "dinov3-vits16": {**DINOV3_ALL, **sizes(384, 1536, 12, 6), "gated_mlp": False},
    "dinov3-vitb16": {**DINOV3_ALL, **sizes(768, 3072, 12, 12), "gated_mlp": False},
    "dinov3-vitl16": {**DINOV3_ALL, **sizes(1024, 4096, 24, 16), "gated_mlp": False},
    "dinov3-vith16plus": {**DINOV3_ALL, **sizes(1280, 5120, 32, 20), "gated_mlp": True},
}
