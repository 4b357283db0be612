"""The encoder alone: positions, pixels, isolation of images, and parity with transformers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import Siglip2VisionConfig, Siglip2VisionModel

from shared.geometry import Budget, patch_positions
from tests.trainer.batches import GEOMETRY, Picture, make_batch, tiny_config
from trainer.attention import encoder_mask
from trainer.data.batch import Batch
from trainer.models.init import init_parameters
from trainer.models.siglip2 import PositionEmbedding, Siglip2Encoder, normalize_pixels, resize_weights
from trainer.models.vlm import VisionLanguageModel


def encoder_with_weights() -> Siglip2Encoder:
    model = VisionLanguageModel(tiny_config(), GEOMETRY)
    init_parameters(model, tiny_config(), seed=1)
    assert model.encoder is not None
    return model.encoder


def encode(encoder: Siglip2Encoder, batch: Batch) -> Tensor:
    mask = encoder_mask(batch.image_ids_NL, batch.grid_thw_NL3)
    return encoder(batch.pixel_values_NLP, batch.grid_thw_NL3, batch.image_sizes_NL2, mask)


# Enlarging, shrinking, one of each, identity, one row. Not h x 1: torch's CPU kernel is wrong there
# (contiguous tensors, torch 2.11 and 2.13: an error of about 1).
@pytest.mark.parametrize("size", [(5, 7), (32, 48), (20, 9), (3, 40), (16, 16), (1, 9), (2, 2)])
def test_position_embedding_equals_interpolate_with_antialias(size: tuple[int, int]) -> None:
    h, w = size
    module = PositionEmbedding(16, 8)
    torch.nn.init.uniform_(module.weight, -1, 1)
    grid_thw = torch.from_numpy(patch_positions(np.array([[1, h, w]]), 1))[None]
    ours = module(grid_thw, torch.tensor([h, w], dtype=torch.int32).expand(1, h * w, 2))
    table = module.weight.detach().double().view(1, 16, 16, 8).permute(0, 3, 1, 2)
    reference = interpolate(table, size=size, mode="bilinear", antialias=True, align_corners=False)
    reference = reference[0].permute(1, 2, 0).reshape(1, h * w, 8)
    assert (ours.double() - reference).abs().max() < 1e-6


def test_resize_weights_by_hand() -> None:
    # 2 samples of 4 entries: scale 2, centres 1 and 3, a triangle of half width 2 over .5 1.5 2.5 3.5:
    # 1 - |.5-1|/2 = .75, .75, .25, 0 -> divided by their sum 1.75.
    expected = torch.tensor([[3, 3, 1, 0], [0, 1, 3, 3]]) / 7
    assert torch.allclose(resize_weights(torch.tensor([0, 1]), torch.tensor([2, 2]), 4), expected)


def test_padding_gets_the_weights_of_an_image_of_one_patch() -> None:
    # 1 sample of 4 entries: centre 2, half width 4: 1 - |.5-2|/4 = 5/8, 7/8, 7/8, 5/8, their sum 24/8.
    weights = resize_weights(torch.tensor([-1]), torch.tensor([-1]), 4)
    assert torch.allclose(weights, torch.tensor([[5.0, 7.0, 7.0, 5.0]]) / 24)


def test_pixels_are_normalized_per_channel_with_the_channel_fastest() -> None:
    pixels = torch.tensor([[0, 255, 51, 255, 0, 102]], dtype=torch.uint8)
    ours = normalize_pixels(pixels, (0.5, 0.0, 0.2), (0.5, 1.0, 0.1))
    # channel 0: (0 - .5) / .5, (1 - .5) / .5; channel 1: 1 and 0; channel 2: (.2 - .2) / .1, (.4 - .2) / .1
    assert torch.allclose(ours, torch.tensor([[-1.0, 1.0, 0.0, 1.0, 0.0, 2.0]]), atol=1e-6)


def test_changing_one_image_changes_no_other_image() -> None:
    encoder = encoder_with_weights()
    # Two images in row 0, one in row 1; change the first.
    pictures = [Picture(2, 4), Picture(4, 2, seed=1), Picture(4, 4, seed=2)]
    batch = make_batch([[[5, *pictures, 6]]], Budget(S=32, N=2, L=20))
    pixels = batch.pixel_values_NLP.clone()
    pixels[0, :8] = 255 - pixels[0, :8]
    before, after = (
        encode(encoder, each) for each in (batch, dataclasses.replace(batch, pixel_values_NLP=pixels))
    )
    assert torch.equal(before[0, 8:16], after[0, 8:16]) and torch.equal(before[1], after[1])
    assert not torch.allclose(before[0, :8], after[0, :8])


def test_padding_changes_no_image() -> None:
    encoder = encoder_with_weights()
    batch = make_batch([[[5, Picture(2, 4), 6]]], Budget(S=16, N=2, L=12))
    noise = torch.where(
        batch.image_ids_NL[..., None] < 0, torch.tensor(77, dtype=torch.uint8), batch.pixel_values_NLP
    )
    before, after = (
        encode(encoder, each) for each in (batch, dataclasses.replace(batch, pixel_values_NLP=noise))
    )
    assert torch.equal(before[0, :8], after[0, :8])
    assert after.isfinite().all() and not torch.allclose(before[1], after[1])


def test_frames_of_a_video_do_not_see_each_other() -> None:
    encoder = encoder_with_weights()
    batch = make_batch([[[5, Picture(2, 4, t=2), 6]]], Budget(S=16, N=1, L=16))
    pixels = batch.pixel_values_NLP.clone()
    pixels[0, :8] = 255 - pixels[0, :8]
    before, after = (
        encode(encoder, each) for each in (batch, dataclasses.replace(batch, pixel_values_NLP=pixels))
    )
    assert torch.equal(before[0, 8:], after[0, 8:]) and not torch.allclose(before[0, :8], after[0, :8])


def test_encoder_equals_transformers_on_packed_images_of_several_sizes() -> None:
    encoder = encoder_with_weights()
    sizes = [(2, 4), (6, 2), (4, 6)]
    batch = make_batch([[[5, *(Picture(h, w) for h, w in sizes)]]], Budget(S=32, N=2, L=24))
    ours = encode(encoder, batch)
    ours = [ours[0, :8], ours[0, 8:20], ours[1, :24]]
    reference = transformers_encoder(encoder)
    for (h, w), z in zip(sizes, ours, strict=True):
        # transformers wants raster order: the place of each raster patch in our cell by cell order.
        place = patch_positions(np.array([[1, h, w]]), 2)
        raster = torch.from_numpy(np.lexsort((place[:, 2], place[:, 1])))
        pixels = (torch.from_numpy(Picture(h, w).pixels()).float() / 255 - 0.5) / 0.5
        theirs = reference(
            pixel_values=pixels[raster][None],
            pixel_attention_mask=torch.ones(1, h * w, dtype=torch.int32),
            spatial_shapes=torch.tensor([[h, w]]),
        ).last_hidden_state[0]
        assert (z[raster] - theirs).abs().max() < 1e-5


def transformers_encoder(encoder: Siglip2Encoder) -> Siglip2VisionModel:
    """The reference with our weights, renamed by hand."""
    config = Siglip2VisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=2,
        num_patches=16,
        vision_use_head=False,
    )
    reference = Siglip2VisionModel(config).eval()
    names = {
        ("embeddings." if "embedding" in name else "encoder." if name.startswith("layers") else "")
        + name: value
        for name, value in encoder.state_dict().items()
    }
    missing, unexpected = reference.load_state_dict(names, strict=False)
    assert not unexpected and not [name for name in missing if not name.startswith("head")]
    return reference
