"""The same numbers as transformers: outputs, and gradients of parameters and inputs, from the same weights.

The references are small and random; their weights travel through real safetensors files and are renamed here,
by hand. Every weight is far from its usual start, so that no softmax is flat and no bias is zero.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from shared.geometry import Budget, Geometry, patch_positions
from tests.trainer.batches import ENCODERS, IMAGE, VOCABULARY, Document, Picture, make_batch
from trainer.attention import document_mask
from trainer.data.batch import Batch
from trainer.models.decoder import Decoder, DecoderConfig, RopeScalingConfig, rotary_frequencies
from trainer.models.encoder import make_encoder
from trainer.models.projector import ProjectorConfig
from trainer.models.vision import frame_segments
from trainer.models.vlm import ModelConfig, VisionLanguageModel

# float32 noise is 1e-6 of the scale; a wrong formula shows from 1e-4 up.
TOLERANCE = 1e-5
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)

VISION_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 2,
}
REFERENCES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "siglip2": (Siglip2VisionModel, Siglip2VisionConfig, {"num_patches": 16, "vision_use_head": False}),
    "aimv2": (Aimv2VisionModel, Aimv2VisionConfig, {"is_native": True, "use_head": False}),
    "aimv2 learned": (Aimv2VisionModel, Aimv2VisionConfig, {"image_size": 8, "use_head": False}),
    "dinov3": (DINOv3ViTModel, DINOv3ViTConfig, {"num_register_tokens": 2}),
    "dinov3 gated": (
        DINOv3ViTModel,
        DINOv3ViTConfig,
        {"num_register_tokens": 2, "use_gated_mlp": True, "hidden_act": "silu"},
    ),
}
# No h x 1 grid: there interpolate of torch is wrong on CPU, and the SigLIP2 of transformers with it.
PICTURES = {1: [(3, 5), (1, 7), (5, 2), (4, 4), (2, 3)], 2: [(2, 4), (6, 2), (4, 6), (2, 2)]}


def scramble(reference: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.25)


def saved(reference: Any, directory: Path) -> dict[str, Tensor]:
    reference.save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def renamed(tensors: dict[str, Tensor], rules: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Names by the first rule that fits; convolutions [E, c, ph, pw] as matrices over (ph, pw, c)."""
    out: dict[str, Tensor] = {}
    for name, value in tensors.items():
        new = next((re.sub(old, to, name) for old, to in rules if re.match(old, name)), name)
        out[new] = value.permute(0, 2, 3, 1).flatten(1) if value.dim() == 4 else value
    return out


ENCODER_RULES = [
    (r"embeddings\.patch_embed(ding|dings)?\.", "patch_embedding."),
    (r"embeddings\.rms_norm\.", "patch_norm."),
    (r"embeddings\.", ""),
    (r"encoder\.layers\.", "layers."),
    (r"(model\.)?layer\.", "layers."),
]
DECODER_RULES = [(r"model\.", "")]
COMPOSED_RULES = [
    (r"model\.vision_tower\.(embeddings\.|encoder\.)?", "encoder."),
    (r"model\.multi_modal_projector\.", "projector."),
    (r"model\.language_model\.", "decoder."),
    (r"lm_head\.", "decoder.lm_head."),
]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def normed(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest difference of one gradient, in units of the norm of all."""
    assert ours.keys() == theirs.keys()
    scale = torch.stack([value.norm() for value in theirs.values()]).norm()
    return max(float((ours[name] - theirs[name]).norm() / scale) for name in theirs)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


def raster_order(picture: Picture, merge: int) -> Tensor:
    """Where each patch of the reference's order, line by line, lies in our order, cell by cell."""
    place = patch_positions(np.array([[1, picture.h, picture.w]]), merge)
    return torch.from_numpy(np.lexsort((place[:, 2], place[:, 1])))


def normalized(pixels_XP: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    x = pixels_XP.unflatten(-1, (-1, 3)) / 255
    return ((x - torch.tensor(mean)) / torch.tensor(std)).flatten(-2)


def reference_features(reference: nn.Module, picture: Picture, pixels_XP: Tensor, merge: int) -> Tensor:
    """Features of one picture alone, patches and features in our order."""
    order = raster_order(picture, merge)
    x = normalized(pixels_XP, MEAN, STD)[order]
    if isinstance(reference, Siglip2VisionModel):
        mask, shape = torch.ones(1, len(x), dtype=torch.int32), torch.tensor([[picture.h, picture.w]])
        out = reference(pixel_values=x[None], pixel_attention_mask=mask, spatial_shapes=shape)
    else:
        image = x.view(picture.h, picture.w, 2, 2, 3).permute(4, 0, 2, 1, 3)
        out = reference(pixel_values=image.reshape(1, 3, 2 * picture.h, 2 * picture.w))
    return out.last_hidden_state[0, -len(x) :][order.argsort()]


@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize("name", REFERENCES)
def test_encoder_equals_transformers_on_packed_pictures(name: str, merge: int, tmp_path: Path) -> None:
    model_class, config_class, options = REFERENCES[name]
    reference = model_class(config_class(**VISION_SIZES, **options)).eval()
    scramble(reference)
    encoder = make_encoder(ENCODERS[name], MEAN, STD)
    weights = renamed(saved(reference, tmp_path), ENCODER_RULES)
    weights.pop("mask_token", None)  # of DINOv3's own training
    encoder.load_state_dict(weights)

    # transformers has the fixed AIMv2 for one size only, that of its table.
    sizes = [(4, 4), (4, 4)] if name == "aimv2 learned" else PICTURES[merge]
    pictures = [Picture(h, w, seed=seed) for seed, (h, w) in enumerate(sizes)]
    batch = make_batch([[[5, *pictures]]], Budget(S=80, N=2, L=44), merge)
    pixels = batch.pixel_values_NLP.float().requires_grad_()
    segments = frame_segments(batch.image_ids_NL, batch.grid_thw_NL3)
    seen = encoder.attention_segments(segments)
    mask = (seen[:, :, None] == seen[:, None, :]).unsqueeze(1)
    z_NLE = encoder(pixels, batch.grid_thw_NL3, batch.image_sizes_NL2, segments, mask)

    loss = torch.zeros(())
    inputs: list[tuple[Tensor, Tensor]] = []
    for number, picture in enumerate(pictures):
        here = batch.image_ids_NL == number
        leaf = torch.from_numpy(picture.pixels()).float().requires_grad_()
        theirs = reference_features(reference, picture, leaf, merge)
        assert relative(z_NLE[here], theirs) < TOLERANCE
        weight = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(number))
        loss = loss + (z_NLE[here] * weight).sum()
        (theirs * weight).sum().backward()
        inputs.append((here, leaf))
    loss.backward()
    assert normed(gradients(encoder), renamed(gradients(reference), ENCODER_RULES)) < TOLERANCE
    for here, leaf in inputs:
        assert relative(pixels.grad[here], leaf.grad) < TOLERANCE
    assert pixels.grad[batch.image_ids_NL < 0].eq(0).all()


TEXT_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
}
# Of the 4 pairs of a head at theta 1000, the first turns 10 times in 64 tokens and is kept, the second 1.8
# times and is partly slowed, the others turn less than once and are slowed by 8.
SCALING = RopeScalingConfig(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64)
ROPE = {"rope_type": "default", "rope_theta": 1000.0}
SCALED_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def text_config(kind: str, *, tied: bool, scaled: bool) -> tuple[DecoderConfig, LlamaConfig | Qwen3Config]:
    config_class = {"llama": LlamaConfig, "qwen3": Qwen3Config}[kind]
    theirs = config_class(
        **TEXT_SIZES,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        rope_parameters=dict(SCALED_ROPE if scaled else ROPE),
    )
    ours = DecoderConfig(
        type=kind,  # pyright: ignore[reportArgumentType]  # one of the two
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rope_theta=1000.0,
        rope_scaling=SCALING if scaled else None,
        rms_norm_eps=1e-6,
        tie_embeddings=tied,
    )
    return ours, theirs


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_decoder_equals_transformers_on_packed_documents(
    kind: str, tied: bool, scaled: bool, tmp_path: Path
) -> None:
    config, reference_config = text_config(kind, tied=tied, scaled=scaled)
    model_class = {"llama": LlamaForCausalLM, "qwen3": Qwen3ForCausalLM}[kind]
    reference = model_class(reference_config).eval()
    scramble(reference)
    decoder = Decoder(config)
    decoder.load_state_dict(renamed(saved(reference, tmp_path), DECODER_RULES))

    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(5, VOCABULARY, (length,), generator=generator) for length in (90, 1, 30)]
    positions_BS = torch.cat([torch.arange(len(text)) for text in texts])[None].int()
    h_BSD = decoder.embed_tokens(torch.cat(texts)[None])
    h_BSD.retain_grad()
    logits = decoder(h_BSD, positions_BS, document_mask(positions_BS)) @ decoder.head_weight.t()
    weight = torch.randn(logits.shape, generator=generator)
    (logits * weight).sum().backward()

    ours = zip(*(x[0].split([90, 1, 30]) for x in (logits, weight, h_BSD.grad)), strict=True)
    for text, (logits_TV, weight_TV, gradient_TD) in zip(texts, ours, strict=True):
        inputs = reference.get_input_embeddings()(text[None])
        inputs.retain_grad()
        theirs = reference(inputs_embeds=inputs).logits[0]
        assert relative(logits_TV, theirs) < TOLERANCE
        (theirs * weight_TV).sum().backward()
        assert relative(gradient_TD, inputs.grad[0]) < TOLERANCE
    assert normed(gradients(decoder), renamed(gradients(reference), DECODER_RULES)) < TOLERANCE


def test_rotary_frequencies_of_llama_are_those_of_transformers() -> None:
    here = torch.device("cpu")
    for scaling, rope in (
        (None, {"rope_type": "default", "rope_theta": 500000.0}),
        (
            RopeScalingConfig(factor=32.0),
            {**SCALED_ROPE, "rope_theta": 500000.0, "factor": 32.0, "original_max_position_embeddings": 8192},
        ),
    ):
        config = LlamaConfig(head_dim=64, max_position_embeddings=131072, rope_parameters=rope)
        theirs = LlamaRotaryEmbedding(config).inv_freq
        ours = rotary_frequencies(64, 500000.0, scaling, here)
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=0)
        assert scaling is not None or torch.equal(ours, theirs)


DOCUMENTS: list[Document] = [
    [7, 8, Picture(4, 2), 9, 10, 11],
    [12, 13, 14],
    [Picture(2, 6, seed=1), 15, Picture(4, 4, seed=2), 16, 17],
    [18, Picture(2, 2, seed=3), 19],
]


def composed_reference(text: Any, merge: int, layer_norm: bool) -> Lfm2VlForConditionalGeneration:
    vision = Siglip2VisionConfig(**VISION_SIZES, num_patches=16, vision_use_head=False)
    config = Lfm2VlConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        projector_hidden_size=32,
        projector_use_layernorm=layer_norm,
        downsample_factor=merge,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    return Lfm2VlForConditionalGeneration(config).eval()


def reference_logits(reference: nn.Module, tokens: Tensor, pictures: Sequence[Picture], merge: int) -> Tensor:
    """[T, V] of one document alone."""
    if not pictures:
        return reference(input_ids=tokens[None]).logits[0]
    longest = max(picture.patches for picture in pictures)
    pixels = torch.zeros(len(pictures), longest, 12)
    mask = torch.zeros(len(pictures), longest, dtype=torch.int32)
    for i, picture in enumerate(pictures):
        x = torch.from_numpy(picture.pixels()).float()
        pixels[i, : len(x)] = normalized(x, MEAN, STD)[raster_order(picture, merge)]
        mask[i, : len(x)] = 1
    shapes = torch.tensor([[picture.h, picture.w] for picture in pictures])
    return reference(
        input_ids=tokens[None], pixel_values=pixels, pixel_attention_mask=mask, spatial_shapes=shapes
    ).logits[0]


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_composed_model_equals_transformers_on_packed_documents(
    kind: str, merge: int, layer_norm: bool, tmp_path: Path
) -> None:
    config, text = text_config(kind, tied=layer_norm, scaled=merge == 2)
    reference = composed_reference(text, merge, layer_norm)
    scramble(reference)
    projector = ProjectorConfig(merge=merge, hidden_size=32, layer_norm=layer_norm)
    geometry = Geometry(patch_size=2, merge=merge, max_patches_per_image=64, mean=MEAN, std=STD)
    model = VisionLanguageModel(
        ModelConfig(encoder=ENCODERS["siglip2"], projector=projector, decoder=config), geometry
    )
    model.load_state_dict(renamed(saved(reference, tmp_path), COMPOSED_RULES))

    batch = make_batch([DOCUMENTS[:3], DOCUMENTS[3:]], Budget(S=80, N=2, L=24), merge)
    logits = model.logits(batch)
    loss = torch.zeros(())
    for document, (row, begin, end) in zip(DOCUMENTS, document_spans(batch), strict=True):
        pictures = [part for part in document if isinstance(part, Picture)]
        tokens = batch.tokens_BS[row, begin:end].long()
        theirs = reference_logits(reference, tokens, pictures, merge)
        ours = logits[row, begin:end]
        assert relative(ours, theirs) < TOLERANCE
        weight = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(begin))
        loss = loss + (ours * weight).sum()
        (theirs * weight).sum().backward()
    loss.backward()
    assert normed(gradients(model), renamed(gradients(reference), COMPOSED_RULES)) < TOLERANCE


def document_spans(batch: Batch) -> list[tuple[int, int, int]]:
    """(row, begin, end) of every document; what follows the last one of a row is padding."""
    spans: list[tuple[int, int, int]] = []
    for row, positions in enumerate(batch.positions_BS):
        starts = (positions == 0).nonzero().flatten().tolist()
        spans += [(row, begin, end) for begin, end in pairwise(starts)]
    return spans
