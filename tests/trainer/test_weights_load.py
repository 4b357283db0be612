"""Import: real models of transformers, saved by it and read by us, equal to the bit; and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    Aimv2Config,
    Aimv2Model,
    Aimv2VisionConfig,
    Aimv2VisionModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Siglip2Config,
    Siglip2Model,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

from shared.config import load_config
from shared.errors import UserError
from tests.trainer.batches import GEOMETRY, tiny_config
from trainer.config import RunConfig
from trainer.models.aimv2 import Aimv2Config as OurAimv2Config
from trainer.models.decoder import DecoderConfig, RopeScalingConfig
from trainer.models.dinov3 import Dinov3Config
from trainer.models.init import init_parameters
from trainer.models.siglip2 import Siglip2Config as OurSiglip2Config
from trainer.models.vlm import ModelConfig, VisionLanguageModel
from trainer.weights.load import load_part, load_start_weights
from trainer.weights.settings import check_settings, write_decoder, write_siglip2

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEXT: dict[str, Any] = {**SIZES, "vocab_size": 9, "eos_token_id": 2}
SIGLIP2: dict[str, Any] = {**SIZES, "patch_size": 2, "num_patches": 16}
LLAMA: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
AIMV2: dict[str, Any] = {**SIZES, "patch_size": 2, "image_size": 8}
DINOV3: dict[str, Any] = {**SIZES, "patch_size": 2, "num_register_tokens": 2}


def save(model: PreTrainedModel, path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    torch.manual_seed(0)
    for parameter in model.parameters():  # transformers leaves some at 0 or 1: a swap would go unnoticed
        torch.nn.init.normal_(parameter)
    model.to(dtype).save_pretrained(path, **options)
    return path


def new_model(config: ModelConfig) -> VisionLanguageModel:
    model = VisionLanguageModel(config, GEOMETRY)
    init_parameters(model, config, seed=1)
    return model


def with_encoder(encoder: Any) -> ModelConfig:
    return replace(tiny_config(), encoder=encoder)


def of(model: VisionLanguageModel, part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): p for name, p in model.named_parameters() if name.startswith(part)}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, theirs[name].float()), name


def siglip2_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names by hand, independent of trainer.weights."""
    names = {name.removeprefix("vision_model."): value for name, value in weights.items()}
    return {
        name.removeprefix("embeddings.").removeprefix("encoder."): value
        for name, value in names.items()
        if not name.startswith(("head", "text_model", "logit"))
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_siglip2_tower_saved_alone_is_read_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    path = save(Siglip2VisionModel(Siglip2VisionConfig(**SIGLIP2)), tmp_path / "hub", dtype)
    model = new_model(tiny_config())
    [line] = load_part(path, "encoder", [model], tiny_config(), GEOMETRY)
    assert_equal(of(model, "encoder"), siglip2_names(load_file(path / "model.safetensors")))
    assert "11 of the pooling head" in line


def test_the_tower_of_a_siglip2_of_text_and_pictures_is_read_from_many_files(tmp_path: Path) -> None:
    whole = Siglip2Model(Siglip2Config(vision_config=SIGLIP2, text_config=TEXT))
    path = save(whole, tmp_path / "hub", max_shard_size="10KB")
    files = sorted(path.glob("model-*.safetensors"))
    assert len(files) > 2
    model = new_model(tiny_config())
    decoder = {name: value.clone() for name, value in of(model, "decoder").items()}
    [line] = load_part(path, "encoder", [model], tiny_config(), GEOMETRY)
    weights = {name: value for file in files for name, value in load_file(file).items()}
    assert_equal(of(model, "encoder"), siglip2_names(weights))
    assert_equal(of(model, "decoder"), decoder)
    text = sum(name.startswith("text_model.") for name in weights)
    assert f"2 of the contrastive loss, 11 of the pooling head, {text} of the text tower" in line


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_aimv2_is_read_with_its_convolution_as_a_linear_map(
    tmp_path: Path, native: bool, whole: bool
) -> None:
    sizes = {**AIMV2, "is_native": native}
    theirs = (
        Aimv2Model(Aimv2Config(vision_config=sizes, text_config=TEXT))
        if whole
        else Aimv2VisionModel(Aimv2VisionConfig(**sizes))
    )
    path = save(theirs, tmp_path / "hub")
    encoder = OurAimv2Config(
        hidden_size=16,
        intermediate_size=32,
        num_layers=2,
        num_heads=2,
        patch_size=2,
        positions="sincos" if native else "learned",
        position_grid=4,
    )
    model = new_model(config := with_encoder(encoder))
    load_part(path, "encoder", [model], config, GEOMETRY)
    weights = {
        name.removeprefix("vision_model."): value
        for name, value in load_file(path / "model.safetensors").items()
    }
    ours = of(model, "encoder")
    convolution_Echw = weights["embeddings.patch_embed.weight"]
    # Value (row, column, colour) of a patch, colour fastest.
    assert ours["patch_embedding.weight"][3, (1 * 2 + 0) * 3 + 2] == convolution_Echw[3, 2, 1, 0]
    assert ours["patch_embedding.weight"][5, (0 * 2 + 1) * 3 + 1] == convolution_Echw[5, 1, 0, 1]
    for name in ours.keys() - {"patch_embedding.weight"}:
        renamed = {"patch_norm.": "embeddings.rms_norm.", "patch_embedding.": "embeddings.patch_embed."}
        prefix = name.partition(".")[0] + "."
        there = renamed.get(prefix, {"layers.": "encoder.layers."}.get(prefix, prefix)) + name.removeprefix(
            prefix
        )
        there = there.replace("position_embedding", "embeddings.position_embedding")
        assert torch.equal(ours[name], weights[there]), name


@pytest.mark.parametrize("gated", [True, False])
def test_dinov3_is_read_but_for_its_mask_token(tmp_path: Path, gated: bool) -> None:
    sizes = {**DINOV3, "use_gated_mlp": gated, "hidden_act": "silu" if gated else "gelu"}
    path = save(DINOv3ViTModel(DINOv3ViTConfig(**sizes)), tmp_path / "hub")
    encoder = Dinov3Config(
        hidden_size=16,
        intermediate_size=32,
        num_layers=2,
        num_heads=2,
        patch_size=2,
        num_registers=2,
        gated_mlp=gated,
    )
    model = new_model(config := with_encoder(encoder))
    [line] = load_part(path, "encoder", [model], config, GEOMETRY)
    assert "not used: 1 of the mask token" in line
    weights, ours = load_file(path / "model.safetensors"), of(model, "encoder")
    patch_Echw = weights.pop("embeddings.patch_embeddings.weight")
    assert torch.equal(ours.pop("patch_embedding.weight"), patch_Echw.permute(0, 2, 3, 1).reshape(16, 12))
    del weights["embeddings.mask_token"]
    renamed = {
        name.replace("embeddings.patch_embeddings", "patch_embedding")
        .removeprefix("embeddings.")
        .replace("layer.", "layers."): value
        for name, value in weights.items()
    }
    assert_equal(ours, renamed)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_decoder_is_read_to_the_bit(tmp_path: Path, family: str, tied: bool) -> None:
    kind, config = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen3": (Qwen3ForCausalLM, Qwen3Config)}[
        family
    ]
    path = save(kind(config(**LLAMA, tie_word_embeddings=tied)), tmp_path / "hub", max_shard_size="9KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    ours = tiny_config(type=family, tie_embeddings=tied)
    model = new_model(ours)
    load_part(path, "decoder", [model], ours, GEOMETRY)
    weights = {name: value for file in path.glob("*.safetensors") for name, value in load_file(file).items()}
    assert_equal(
        of(model, "decoder"), {name.removeprefix("model."): value for name, value in weights.items()}
    )


def test_a_tied_head_that_the_file_holds_too_is_named_and_not_used(tmp_path: Path) -> None:
    path = save(LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)), tmp_path / "hub")
    weights = load_file(path / "model.safetensors")
    inv_freq = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(
        {**weights, "lm_head.weight": torch.zeros(40, 24), inv_freq: torch.zeros(3)},
        path / "model.safetensors",
    )
    model = new_model(config := tiny_config(tie_embeddings=True))
    [line] = load_part(path, "decoder", [model], config, GEOMETRY)
    assert "1 of the rotary frequencies, 1 of the tied head" in line
    assert torch.equal(of(model, "decoder")["embed_tokens.weight"], weights["model.embed_tokens.weight"])


def test_both_ways_of_writing_rotary_scaling_are_understood(tmp_path: Path) -> None:
    path = save(LlamaForCausalLM(LlamaConfig(**{**LLAMA, "rope_parameters": LLAMA3_ROPE})), tmp_path / "hub")
    scaling = RopeScalingConfig(factor=32.0, original_max_positions=64)
    scaled = tiny_config(rope_scaling=scaling)
    load_part(path, "decoder", [new_model(scaled)], scaled, GEOMETRY)
    settings = json.loads((path / "config.json").read_text())
    settings["rope_scaling"] = settings.pop("rope_parameters")
    settings["rope_theta"] = settings["rope_scaling"].pop("rope_theta")
    (path / "config.json").write_text(json.dumps(settings))
    load_part(path, "decoder", [new_model(scaled)], scaled, GEOMETRY)
    with pytest.raises(UserError, match=r"decoder\.rope_scaling\.factor is not set, set it to 32\.0"):
        load_part(path, "decoder", [new_model(tiny_config())], tiny_config(), GEOMETRY)


def test_rotary_scaling_that_only_the_config_has_is_refused(tmp_path: Path) -> None:
    path = save(LlamaForCausalLM(LlamaConfig(**LLAMA)), tmp_path / "hub")
    config = tiny_config(rope_scaling=RopeScalingConfig(factor=2.0))
    with pytest.raises(UserError, match=r"decoder\.rope_scaling\.factor is 2\.0, leave it out"):
        load_part(path, "decoder", [new_model(config)], config, GEOMETRY)


def test_rows_of_a_larger_vocabulary_keep_their_initial_values_and_are_named(tmp_path: Path) -> None:
    path = save(LlamaForCausalLM(LlamaConfig(**LLAMA)), tmp_path / "hub")
    config = tiny_config(vocab_size=48)
    model = new_model(config)
    before = {name: value.clone() for name, value in of(model, "decoder").items()}
    lines = load_part(path, "decoder", [model], config, GEOMETRY)
    weights, after = load_file(path / "model.safetensors"), of(model, "decoder")
    for ours, theirs in (
        ("embed_tokens.weight", "model.embed_tokens.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ):
        assert torch.equal(after[ours], torch.cat([weights[theirs], before[ours][40:]]))
        assert any(f"decoder.{ours}: rows 40 to 47 are new" in line for line in lines)


def test_a_stage_without_all_parts_reads_its_own(tmp_path: Path) -> None:
    path = save(LlamaForCausalLM(LlamaConfig(**LLAMA)), tmp_path / "hub")
    whole, last = new_model(tiny_config()), new_model(tiny_config())
    last.encoder = last.projector = last.decoder.embed_tokens = None
    del last.decoder.layers["0"]
    load_part(path, "decoder", [whole], tiny_config(), GEOMETRY)
    load_part(path, "decoder", [last], tiny_config(), GEOMETRY)
    expected = of(whole, "decoder")
    ours = of(last, "decoder")
    assert ours.keys() == {name for name in expected if not name.startswith(("embed_tokens", "layers.0"))}
    assert_equal(ours, {name: expected[name] for name in ours})


def test_start_weights_are_read_for_the_parts_that_are_named(tmp_path: Path) -> None:
    path = save(LlamaForCausalLM(LlamaConfig(**LLAMA)), tmp_path / "hub")
    model = new_model(tiny_config())
    encoder = {name: value.clone() for name, value in of(model, "encoder").items()}
    [line] = load_start_weights("", str(path), [model], tiny_config(), GEOMETRY)
    assert line.startswith("decoder") and "F32" in line
    assert_equal(of(model, "encoder"), encoder)
    assert torch.equal(
        of(model, "decoder")["norm.weight"], load_file(path / "model.safetensors")["model.norm.weight"]
    )


def test_other_pixels_than_the_encoder_was_trained_on_are_told(tmp_path: Path) -> None:
    path = save(Siglip2VisionModel(Siglip2VisionConfig(**SIGLIP2)), tmp_path / "hub")
    settings = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    for std, expected in ((0.5, 1), (0.25, 2)):
        settings["image_std"] = [0.5, 0.5, std]
        (path / "preprocessor_config.json").write_text(json.dumps(settings))
        lines = load_part(path, "encoder", [new_model(tiny_config())], tiny_config(), GEOMETRY)
        assert len(lines) == expected
    assert "std [0.5, 0.5, 0.25], the data set has [0.5, 0.5, 0.5] and [0.5, 0.5, 0.5]" in lines[1]


def test_what_an_export_says_of_its_parts_is_read_back_as_the_same_config(tmp_path: Path) -> None:
    words = "--dataset d --out o --steps 1000 --encoder.preset siglip2-so400m-patch16-naflex --decoder.preset".split()
    runs = [load_config(RunConfig, None, [*words, preset]) for preset in DecoderConfig.PRESETS]
    assert {(run.decoder.type, run.decoder.rope_scaling is None) for run in runs} == {
        ("llama", False),
        ("qwen3", True),
    }
    described = [("decoder", run.decoder, write_decoder(run.decoder)) for run in runs]
    encoder = runs[0].encoder
    assert isinstance(encoder, OurSiglip2Config)
    described += [("encoder", encoder, write_siglip2(encoder))]
    for part, config, settings in described:
        (tmp_path / "config.json").write_text(json.dumps(settings))
        check_settings(tmp_path, part, config)


# What is refused


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": 48, "head_dim": 6}, "decoder.hidden_size is 24, set it to 48"),
        ({"num_hidden_layers": 3}, "decoder.num_layers is 2, set it to 3"),
        ({"num_key_value_heads": 4}, "decoder.num_kv_heads is 2, set it to 4"),
        ({"head_dim": 8}, "decoder.head_dim is 6, set it to 8"),
        ({"rms_norm_eps": 1e-6}, "decoder.rms_norm_eps is 1e-05, set it to 1e-06"),
        ({"vocab_size": 41}, "decoder.vocab_size is 40, set it to 41"),
        ({"tie_word_embeddings": True}, "decoder.tie_embeddings is false, set it to true"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "decoder.rope_theta is 500000.0"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "scaled by 'linear'",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', our llama computes 'silu'"),
        ({"attention_bias": True}, "attention_bias is True"),
    ],
)
def test_another_decoder_than_the_config_describes_is_refused_by_key_and_value(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    path = save(LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes})), tmp_path / "hub")
    for file in path.glob("*.safetensors"):
        file.unlink()  # refused before a weight is looked for
    with pytest.raises(UserError, match=named.replace("(", r"\(")):
        load_part(path, "decoder", [new_model(tiny_config())], tiny_config(), GEOMETRY)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_patches": 25}, "encoder.position_grid is 4, set it to 5"),
        ({"patch_size": 4}, "encoder.patch_size is 2, set it to 4"),
        ({"layer_norm_eps": 1e-5}, "encoder.layer_norm_eps is 1e-06, set it to 1e-05"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', our siglip2 computes 'gelu_pytorch_tanh'"),
    ],
)
def test_another_encoder_than_the_config_describes_is_refused_by_key_and_value(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    path = save(Siglip2VisionModel(Siglip2VisionConfig(**{**SIGLIP2, **changes})), tmp_path / "hub")
    with pytest.raises(UserError, match=named):
        load_part(path, "encoder", [new_model(tiny_config())], tiny_config(), GEOMETRY)


def test_keys_that_config_json_leaves_out_have_the_values_that_transformers_gives_them(
    tmp_path: Path,
) -> None:
    path = save(Siglip2VisionModel(Siglip2VisionConfig(**SIGLIP2)), tmp_path / "hub")
    settings = json.loads((path / "config.json").read_text())
    del settings["num_patches"], settings["layer_norm_eps"]
    (path / "config.json").write_text(json.dumps(settings))
    assert Siglip2VisionConfig.from_pretrained(path).num_patches == 256
    with pytest.raises(UserError, match=r"config's: encoder\.position_grid is 4, set it to 16$"):
        load_part(path, "encoder", [new_model(tiny_config())], tiny_config(), GEOMETRY)


def test_a_directory_of_the_other_part_is_refused_by_its_type(tmp_path: Path) -> None:
    path = save(Siglip2VisionModel(Siglip2VisionConfig(**SIGLIP2)), tmp_path / "hub")
    with pytest.raises(UserError, match=r"model_type 'siglip2_vision_model', decoder\.type is 'llama'"):
        load_part(path, "decoder", [new_model(tiny_config())], tiny_config(), GEOMETRY)


def edit(path: Path, drop: str = "", **more: Tensor) -> None:
    weights = load_file(path / "model.safetensors")
    weights.pop(drop, None)
    save_file({**weights, **more}, path / "model.safetensors")


@pytest.mark.parametrize(
    ("drop", "more", "named"),
    [
        ("model.norm.weight", {}, r"lacks model\.norm\.weight"),
        ("", {"adapter.weight": torch.zeros(2)}, r"has no place here for adapter\.weight"),
        (
            "",
            {"model.layers.0.mlp.up_proj.weight": torch.zeros(48, 23)},
            r"up_proj\.weight has shape \[48, 23\], the model's decoder\.layers\.0\S+ has \[48, 24\]",
        ),
        ("", {"model.embed_tokens.weight": torch.zeros(39, 24)}, None),
    ],
)
def test_every_tensor_is_used_or_named(
    tmp_path: Path, drop: str, more: dict[str, Tensor], named: str | None
) -> None:
    path = save(LlamaForCausalLM(LlamaConfig(**LLAMA)), tmp_path / "hub")
    edit(path, drop, **more)
    model = new_model(tiny_config())
    before = {name: value.clone() for name, value in of(model, "decoder").items()}
    if named is None:  # a table of tokens may have fewer rows
        assert len(load_part(path, "decoder", [model], tiny_config(), GEOMETRY)) == 2
        return
    with pytest.raises(UserError, match=named):
        load_part(path, "decoder", [model], tiny_config(), GEOMETRY)
    assert_equal(of(model, "decoder"), before)  # nothing was read


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    load = lambda path: load_part(path, "decoder", [new_model(tiny_config())], tiny_config(), GEOMETRY)  # noqa: E731
    with pytest.raises(UserError, match=r"no config\.json"):
        load(tmp_path)
    path = save(LlamaForCausalLM(LlamaConfig(**LLAMA)), tmp_path / "hub", max_shard_size="9KB")
    file = sorted(path.glob("model-*.safetensors"))[1]
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(UserError, match=rf"{file.name}: cannot be read .*download"):
        load(path)
    file.write_bytes(whole)
    index = path / "model.safetensors.index.json"
    entries = json.loads(index.read_text())
    del entries["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(entries))
    with pytest.raises(UserError, match=r"does not hold what model\.safetensors\.index\.json says"):
        load(path)
    index.unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        load(path)
