"""`config.json` of a Hugging Face directory against our config, and our config written as one.

What a checkpoint says about its sizes is compared before a weight is read: a wrong size would fail later with a
shape, but a wrong eps, theta or activation would load without a word and be another model.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shared.errors import UserError, closest
from shared.geometry import CHANNELS
from trainer.models.decoder import DecoderConfig
from trainer.models.siglip2 import Siglip2Config

# The towers of transformers take patches of one frame.
ONE_FRAME = {"temporal_patch_size": 1}
Hub = Mapping[str, Any]
"""config.json, or the section of it that describes one part."""


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
    """One kind of model. `sizes` and `fixed` hold what transformers takes where config.json leaves a key out."""

    sizes: tuple[tuple[str, str, Any], ...]
    """Our key, theirs, their default."""
    fixed: tuple[tuple[str, Any, Any], ...]
    """Their key, their default, and the only value that our model computes."""
    derived: Callable[[Hub], dict[str, Any]]
    """Our keys whose values take arithmetic."""


def _rope(hub: Hub) -> dict[str, Any]:
    """Both ways of writing it: `rope_parameters`, and before that `rope_theta` beside `rope_scaling`."""
    rope = hub.get("rope_parameters") or {
        **(hub.get("rope_scaling") or {}),
        "rope_theta": hub.get("rope_theta"),
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"its rotary positions are scaled by {kind!r}, here are only llama3's")
    theta = rope.get("rope_theta") or 10000.0
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    scaling = {key: rope[key] for key in ("factor", "low_freq_factor", "high_freq_factor")}
    scaling["original_max_positions"] = rope["original_max_position_embeddings"]
    return {"rope_theta": theta, "rope_scaling": scaling}


def _decoder(hub: Hub) -> dict[str, Any]:
    heads = hub["num_attention_heads"]
    return {
        "type": hub["model_type"],
        "num_kv_heads": hub.get("num_key_value_heads") or heads,
        "head_dim": hub.get("head_dim")
        or (128 if hub["model_type"] == "qwen3" else hub["hidden_size"] // heads),
        **_rope(hub),
    }


def _siglip2(hub: Hub) -> dict[str, Any]:
    return {"position_grid": math.isqrt(hub.get("num_patches", 256)), **ONE_FRAME}


def _aimv2(hub: Hub) -> dict[str, Any]:
    if hub.get("is_native", False):
        return {"positions": "sincos", **ONE_FRAME}
    grid = hub.get("image_size", 224) // hub.get("patch_size", 14)
    return {"positions": "learned", "position_grid": grid, **ONE_FRAME}


def _dinov3(hub: Hub) -> dict[str, Any]:
    gated, activation = hub.get("use_gated_mlp", False), hub.get("hidden_act", "gelu")
    if activation != (only := "silu" if gated else "gelu"):
        raise ValueError(f"hidden_act is {activation!r}, our dinov3 computes {only!r}")
    return {"gated_mlp": gated, **ONE_FRAME}


DECODER_SIZES = (
    ("vocab_size", "vocab_size", None),
    ("hidden_size", "hidden_size", None),
    ("intermediate_size", "intermediate_size", None),
    ("num_layers", "num_hidden_layers", None),
    ("num_heads", "num_attention_heads", None),
    ("rms_norm_eps", "rms_norm_eps", 1e-6),
    ("tie_embeddings", "tie_word_embeddings", False),
)
DECODER_FIXED = (("hidden_act", "silu", "silu"), ("attention_bias", False, False), ("mlp_bias", False, False))
PICTURES = ("num_channels", CHANNELS, CHANNELS)
BIASES = (
    ("query_bias", True),
    ("key_bias", False),
    ("value_bias", True),
    ("proj_bias", True),
    ("mlp_bias", True),
)

FAMILIES = {
    "llama": Family(DECODER_SIZES, DECODER_FIXED, _decoder),
    "qwen3": Family(DECODER_SIZES, (*DECODER_FIXED, ("use_sliding_window", False, False)), _decoder),
    "siglip2": Family(
        (
            ("hidden_size", "hidden_size", 768),
            ("intermediate_size", "intermediate_size", 3072),
            ("num_layers", "num_hidden_layers", 12),
            ("num_heads", "num_attention_heads", 12),
            ("patch_size", "patch_size", 16),
            ("layer_norm_eps", "layer_norm_eps", 1e-6),
        ),
        (PICTURES, ("hidden_act", "gelu_pytorch_tanh", "gelu_pytorch_tanh")),
        _siglip2,
    ),
    "aimv2": Family(
        (
            ("hidden_size", "hidden_size", 1024),
            ("intermediate_size", "intermediate_size", 2816),
            ("num_layers", "num_hidden_layers", 24),
            ("num_heads", "num_attention_heads", 8),
            ("patch_size", "patch_size", 14),
            ("rms_norm_eps", "rms_norm_eps", 1e-5),
        ),
        (PICTURES, ("hidden_act", "silu", "silu"), ("qkv_bias", False, False), ("mlp_bias", False, False)),
        _aimv2,
    ),
    "dinov3": Family(
        (
            ("hidden_size", "hidden_size", 384),
            ("intermediate_size", "intermediate_size", 1536),
            ("num_layers", "num_hidden_layers", 12),
            ("num_heads", "num_attention_heads", 6),
            ("patch_size", "patch_size", 16),
            ("num_registers", "num_register_tokens", 0),
            ("rope_theta", "rope_theta", 100.0),
            ("layer_norm_eps", "layer_norm_eps", 1e-5),
        ),
        (PICTURES, *((key, value, value) for key, value in BIASES)),
        _dinov3,
    ),
}
# model_type of config.json -> family. Of a model of text and pictures, the vision tower is described in a section.
MODEL_TYPES = {
    "llama": "llama",
    "qwen3": "qwen3",
    "siglip2": "siglip2",
    "siglip2_vision_model": "siglip2",
    "aimv2": "aimv2",
    "aimv2_vision_model": "aimv2",
    "dinov3_vit": "dinov3",
}


def check_settings(directory: Path, part: str, config: Any) -> None:
    """Refuse a directory whose config.json describes another model than `config`, a section named `part`.

    A vocabulary may be larger here than there.

    Raises:
        UserError: names every key of our config that differs, and the value to set.
    """
    hub = read_settings(directory)
    if MODEL_TYPES.get(hub["model_type"]) != config.type:
        raise UserError(
            f"{directory}: is of model_type {hub['model_type']!r}, {part}.type is {config.type!r}; give a directory "
            f"of one of {', '.join(kind for kind, family in MODEL_TYPES.items() if family == config.type)}"
        )
    family = FAMILIES[config.type]
    for key, default, only in family.fixed:
        if (value := hub.get(key, default)) != only:
            raise UserError(
                f"{directory}: {key} is {value!r}, our {config.type} computes {only!r}; it cannot be used"
            )
    theirs, ours = _flat(_translate(directory, family, hub)), _flat(dataclasses.asdict(config))
    keys = [key for key in theirs if not (key == "vocab_size" and ours[key] > theirs[key])]
    wrong = [
        f"{part}.{key} is {_shown(ours.get(key))}, set it to {_shown(theirs[key])}"
        for key in keys
        if ours.get(key) != theirs[key]
    ]
    wrong += [f"{part}.{key} is {_shown(ours[key])}, leave it out" for key in _extra_scaling(ours, theirs)]
    if wrong:
        raise UserError(f"{directory}: is another model than the config's: {'; '.join(wrong)}")


def read_settings(directory: Path) -> dict[str, Any]:
    """config.json; of a model with several towers the section of its vision tower, with `model_type` as it was."""
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{directory}: no config.json there; give a directory of a Hugging Face model")
    try:
        hub = json.loads(path.read_text(encoding="utf-8"))
        kind = hub["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is no config of a model ({error!r}); download it again") from None
    if kind not in MODEL_TYPES:
        raise UserError(f"{directory}: model_type {kind!r} cannot be read; {closest(kind, MODEL_TYPES)}")
    return {**hub.get("vision_config", hub), "model_type": kind}


def write_siglip2(config: Siglip2Config) -> dict[str, Any]:
    """`vision_config` of an export."""
    return {
        "model_type": "siglip2_vision_model",
        **_write(config),
        "num_patches": config.position_grid**2,
        "vision_use_head": False,
    }


def write_decoder(config: DecoderConfig) -> dict[str, Any]:
    """`text_config` of an export, without what the data set decides."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (scaling := config.rope_scaling) is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return {
        "model_type": config.type,
        **_write(config),
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rope_parameters": rope,
    }


def _write(config: Any) -> dict[str, Any]:
    family = FAMILIES[config.type]
    sizes = {theirs: getattr(config, ours) for ours, theirs, _ in family.sizes}
    return sizes | {key: only for key, _, only in family.fixed}


def _translate(directory: Path, family: Family, hub: Hub) -> dict[str, Any]:
    """Our keys with the values of config.json."""
    try:
        sizes = {
            ours: hub[key] if default is None else hub.get(key, default)
            for ours, key, default in family.sizes
        }
        return sizes | family.derived(hub)
    except KeyError as error:
        raise UserError(f"{directory / 'config.json'}: lacks {error}; download it again") from None
    except ValueError as error:
        raise UserError(f"{directory}: cannot be used: {error}") from None


def _extra_scaling(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Keys of a scaling that we have and they do not."""
    return [key for key in ours if key.startswith("rope_scaling.") and key not in theirs]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Without nested tables, and without what is None."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[prefix + key] = value
    return flat


def _shown(value: Any) -> str:
    """As the config file writes it."""
    return "not set" if value is None else json.dumps(value)
