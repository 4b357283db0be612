"""Presets against transformers: the same published sizes, written here a second time, give as many parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

from shared.config import load_config, to_toml
from trainer.models.decoder import Decoder, DecoderConfig
from trainer.models.encoder import EncoderConfig, make_encoder
from trainer.models.presets import AIMV2, DECODERS, DINOV3, SIGLIP2
from trainer.models.siglip2 import Siglip2Config


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    encoder: EncoderConfig = field(default_factory=Siglip2Config)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)


def sizes(hidden: int, intermediate: int, layers: int, heads: int, **rest: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **rest,
    }


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
QWEN3 = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}
# Published numbers of parameters, tied tables counted once.
TEXT = {
    "llama-3.2-1b": (
        LlamaConfig(**sizes(2048, 8192, 16, 32, **LLAMA, tie_word_embeddings=True)),
        1_235_814_400,
    ),
    "llama-3.2-3b": (
        LlamaConfig(**sizes(3072, 8192, 28, 24, **LLAMA, tie_word_embeddings=True)),
        3_212_749_824,
    ),
    "llama-3.1-8b": (LlamaConfig(**sizes(4096, 14336, 32, 32, **LLAMA)), 8_030_261_248),
    "qwen3-0.6b": (Qwen3Config(**sizes(1024, 3072, 28, 16, **QWEN3, tie_word_embeddings=True)), 596_049_920),
    "qwen3-1.7b": (
        Qwen3Config(**sizes(2048, 6144, 28, 16, **QWEN3, tie_word_embeddings=True)),
        1_720_574_976,
    ),
    "qwen3-4b": (Qwen3Config(**sizes(2560, 9728, 36, 32, **QWEN3, tie_word_embeddings=True)), 4_022_468_096),
    "qwen3-8b": (Qwen3Config(**sizes(4096, 12288, 36, 32, **QWEN3)), 8_190_735_360),
}
VISION = {
    "siglip2-base-patch16-naflex": Siglip2VisionConfig(
        **sizes(768, 3072, 12, 12, patch_size=16, num_patches=256, vision_use_head=False)
    ),
    "siglip2-so400m-patch16-naflex": Siglip2VisionConfig(
        **sizes(1152, 4304, 27, 16, patch_size=16, num_patches=256, vision_use_head=False)
    ),
    "aimv2-large-patch14-native": Aimv2VisionConfig(
        **sizes(1024, 2816, 24, 8, patch_size=14, use_head=False, is_native=True)
    ),
    "aimv2-large-patch14-224": Aimv2VisionConfig(
        **sizes(1024, 2816, 24, 8, patch_size=14, image_size=224, use_head=False)
    ),
    "aimv2-huge-patch14-224": Aimv2VisionConfig(
        **sizes(1536, 4096, 24, 12, patch_size=14, image_size=224, use_head=False)
    ),
    "dinov3-vits16": DINOv3ViTConfig(**sizes(384, 1536, 12, 6, num_register_tokens=4)),
    "dinov3-vitb16": DINOv3ViTConfig(**sizes(768, 3072, 12, 12, num_register_tokens=4)),
    "dinov3-vitl16": DINOv3ViTConfig(**sizes(1024, 4096, 24, 16, num_register_tokens=4)),
    "dinov3-vith16plus": DINOv3ViTConfig(
        **sizes(1280, 5120, 32, 20, num_register_tokens=4, use_gated_mlp=True, hidden_act="silu")
    ),
}
MODELS: dict[type, type] = {
    LlamaConfig: LlamaForCausalLM,
    Qwen3Config: Qwen3ForCausalLM,
    Siglip2VisionConfig: Siglip2VisionModel,
    Aimv2VisionConfig: Aimv2VisionModel,
    DINOv3ViTConfig: DINOv3ViTModel,
}


def test_every_preset_is_compared() -> None:
    assert TEXT.keys() == DECODERS.keys()
    assert VISION.keys() == SIGLIP2.keys() | AIMV2.keys() | DINOV3.keys()


@pytest.mark.parametrize("name", TEXT)
def test_a_decoder_has_the_published_number_of_parameters(name: str) -> None:
    theirs, published = TEXT[name]
    config = load_config(Model, None, ["--decoder.preset", name]).decoder
    with torch.device("meta"):
        assert count(Decoder(config)) == count(MODELS[type(theirs)](theirs)) == published
    assert (config.type == "qwen3") == isinstance(theirs, Qwen3Config)
    # Other heads of another width would give as many parameters.
    heads = config.num_heads, config.num_kv_heads, config.head_dim
    assert heads == (theirs.num_attention_heads, theirs.num_key_value_heads, theirs.head_dim)


@pytest.mark.parametrize("name", VISION)
def test_an_encoder_has_the_published_number_of_parameters(name: str) -> None:
    theirs = VISION[name]
    config = load_config(Model, None, ["--encoder.preset", name]).encoder
    # The mask token of DINOv3 serves its own training alone.
    masks = config.hidden_size if isinstance(theirs, DINOv3ViTConfig) else 0
    with torch.device("meta"):
        ours = count(make_encoder(config, (0.5,) * 3, (0.5,) * 3))
        assert ours + masks == count(MODELS[type(theirs)](theirs))
    # What does not change the number of parameters.
    assert (config.num_heads, config.patch_size) == (theirs.num_attention_heads, theirs.patch_size)
    eps = getattr(theirs, "layer_norm_eps", None) or theirs.rms_norm_eps
    assert eps == (config.rms_norm_eps if config.type == "aimv2" else config.layer_norm_eps)


def test_what_parameters_do_not_count_is_as_published() -> None:
    def decoder(name: str) -> DecoderConfig:
        return load_config(Model, None, ["--decoder.preset", name]).decoder

    scaling = {name: decoder(name).rope_scaling for name in DECODERS if name.startswith("llama")}
    factors = {name: each.factor for name, each in scaling.items() if each is not None}
    assert factors == {"llama-3.2-1b": 32.0, "llama-3.2-3b": 32.0, "llama-3.1-8b": 8.0}
    assert {decoder(name).rope_theta for name in factors} == {500000.0}
    qwen3 = [decoder(name) for name in DECODERS if name.startswith("qwen3")]
    assert {(each.rope_theta, each.rms_norm_eps, each.rope_scaling) for each in qwen3} == {(1e6, 1e-6, None)}


def test_the_defaults_of_each_encoder_are_one_of_its_presets() -> None:
    for preset in ("siglip2-base-patch16-naflex", "aimv2-large-patch14-native", "dinov3-vitb16"):
        config = load_config(Model, None, ["--encoder.preset", preset]).encoder
        assert config == type(config)()


@pytest.mark.parametrize("encoder", VISION)
def test_a_preset_with_a_changed_key_saves_and_loads_back_equal(encoder: str, tmp_path: Any) -> None:
    text = f'[encoder]\npreset = "{encoder}"\nnum_layers = 3\n[decoder]\npreset = "llama-3.2-3b"\nvocab_size = 77\n'
    (tmp_path / "run.toml").write_text(text)
    config = load_config(Model, tmp_path / "run.toml", ["--decoder.rope-scaling.factor", "4"])
    assert (config.encoder.num_layers, config.decoder.vocab_size, config.decoder.num_layers) == (3, 77, 28)
    assert config.decoder.rope_scaling is not None and config.decoder.rope_scaling.factor == 4.0
    (tmp_path / "saved.toml").write_text(to_toml(config))
    assert load_config(Model, tmp_path / "saved.toml") == config
