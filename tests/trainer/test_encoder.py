"""The contract of every encoder: a frame sees itself alone, and nothing sees padding."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from shared.geometry import Budget
from tests.trainer.batches import ENCODERS, GEOMETRY, SIZES, Picture, make_batch, tiny_config
from trainer.data.batch import Batch
from trainer.models.dinov3 import Dinov3Config, Dinov3Encoder
from trainer.models.encoder import Encoder, make_encoder
from trainer.models.init import init_parameters
from trainer.models.vision import frame_segments
from trainer.models.vlm import VisionLanguageModel

every_encoder = pytest.mark.parametrize("name", ENCODERS)


def encoder_with_weights(name: str) -> Encoder:
    config = tiny_config(ENCODERS[name])
    model = VisionLanguageModel(config, GEOMETRY)
    init_parameters(model, config, seed=1)
    assert model.encoder is not None
    return model.encoder


def encode(encoder: Encoder, batch: Batch) -> Tensor:
    segments = frame_segments(batch.image_ids_NL, batch.grid_thw_NL3)
    seen = encoder.attention_segments(segments)
    mask = (seen[:, :, None] == seen[:, None, :]).unsqueeze(1)
    return encoder(batch.pixel_values_NLP, batch.grid_thw_NL3, batch.image_sizes_NL2, segments, mask)


def encode_both(encoder: Encoder, batch: Batch, changed: Tensor) -> tuple[Tensor, Tensor]:
    """Features before and after the pixels where `changed` are inverted."""
    pixels = torch.where(changed[..., None], 255 - batch.pixel_values_NLP, batch.pixel_values_NLP)
    return encode(encoder, batch), encode(encoder, dataclasses.replace(batch, pixel_values_NLP=pixels))


@every_encoder
def test_changing_one_image_changes_no_other_image(name: str) -> None:
    # Two images in row 0, one in row 1; change the first.
    pictures = [Picture(2, 4), Picture(4, 2, seed=1), Picture(4, 4, seed=2)]
    batch = make_batch([[[5, *pictures, 6]]], Budget(S=32, N=2, L=20))
    before, after = encode_both(encoder_with_weights(name), batch, batch.image_ids_NL == 0)
    assert torch.equal(before[0, 8:16], after[0, 8:16]) and torch.equal(before[1], after[1])
    assert not torch.isclose(before[0, :8], after[0, :8]).all(dim=-1).any()


@every_encoder
def test_padding_changes_no_image(name: str) -> None:
    batch = make_batch([[[5, Picture(2, 4), 6]]], Budget(S=16, N=2, L=12))
    before, after = encode_both(encoder_with_weights(name), batch, batch.image_ids_NL < 0)
    assert torch.equal(before[0, :8], after[0, :8])
    assert after.isfinite().all() and not torch.allclose(before[1], after[1])


@every_encoder
def test_frames_of_a_video_do_not_see_each_other(name: str) -> None:
    batch = make_batch([[[5, Picture(2, 4, t=2), 6]]], Budget(S=16, N=1, L=16))
    before, after = encode_both(encoder_with_weights(name), batch, batch.grid_thw_NL3[..., 0] == 0)
    assert torch.equal(before[0, 8:], after[0, 8:]) and not torch.allclose(before[0, :8], after[0, :8])


@every_encoder
def test_an_image_is_encoded_the_same_wherever_it_lies(name: str) -> None:
    encoder = encoder_with_weights(name)
    budget, others = Budget(S=32, N=2, L=20), [Picture(4, 2, seed=1), Picture(2, 2, seed=2)]
    first = encode(encoder, make_batch([[[5, Picture(2, 4), *others]]], budget))[0, :8]
    last = encode(encoder, make_batch([[[5, *others, Picture(2, 4)]]], budget))[0, 12:20]
    assert torch.allclose(first, last, atol=1e-5)


@every_encoder
def test_a_patch_may_span_several_frames(name: str) -> None:
    single = encoder_with_weights(name)
    config = dataclasses.replace(ENCODERS[name], temporal_patch_size=2)
    double = make_encoder(config, GEOMETRY.mean, GEOMETRY.std)
    weights = single.state_dict()
    # A weight of zero on the second frame of every patch: what stands there does not count.
    first = weights["patch_embedding.weight"]
    double.load_state_dict({**weights, "patch_embedding.weight": torch.cat([first, first * 0], dim=1)})
    batch = make_batch([[[5, Picture(2, 4), 6]]], Budget(S=16, N=1, L=8))
    pixels = torch.cat([batch.pixel_values_NLP, 255 - batch.pixel_values_NLP], dim=-1)
    ours = encode(double, dataclasses.replace(batch, pixel_values_NLP=pixels))
    assert torch.allclose(ours, encode(single, batch), atol=1e-5)


def test_slots_of_dinov3_stand_beside_the_patches_of_their_frame() -> None:
    config = Dinov3Config(**SIZES, num_registers=1, frames_per_row=3)
    encoder = Dinov3Encoder(config, GEOMETRY.mean, GEOMETRY.std)
    segments = torch.tensor([[0, 0, 1, -1], [-1, -1, -1, -1]], dtype=torch.int32)
    # 2 slots per frame: frame 0 has 2 patches more, frame 1 one; the slots of frame 2 are padding.
    expected = [[0, 0, 0, 0, 1, 1, 1, -1, -1, -1], [-1] * 10]
    assert encoder.attention_segments(segments).tolist() == expected


def test_frames_per_row_is_known_to_those_who_check_it() -> None:
    assert [config.frames_per_row for config in ENCODERS.values()] == [None, None, None, 4, 4]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"frames_per_row": 0}, "frames_per_row must be at least 1, got 0"),
        ({"num_registers": 0}, "num_registers must be at least 1, got 0"),
        ({"num_heads": 8}, "hidden_size / num_heads is 2, which must be a multiple of 4"),
        ({"rope_theta": 0.0}, "rope_theta must be above 0"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps must be above 0"),
    ],
)
def test_a_wrong_size_is_named(values: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(ENCODERS["dinov3"], **values)
