"""What encoders share: pixels, learned positions, and which patches belong together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from shared.geometry import patch_positions
from trainer.models.vision import PositionEmbedding, frame_segments, normalize_pixels, resize_weights


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


def test_frames_are_counted_along_each_row_and_padding_is_none() -> None:
    # Row 0: image 4 of two frames, image 5 of one frame (also number 0), padding. Row 1: image 6. Row 2: empty.
    images = torch.tensor([[4, 4, 4, 4, 5, -1], [6, 6, -1, -1, -1, -1], [-1] * 6], dtype=torch.int32)
    frames = torch.tensor([[0, 0, 1, 1, 0, -1], [0, 0, -1, -1, -1, -1], [-1] * 6], dtype=torch.int32)
    grid = torch.stack([frames, torch.zeros_like(frames), torch.zeros_like(frames)], dim=-1)
    segments = frame_segments(images, grid)
    assert segments.dtype == torch.int32
    assert segments.tolist() == [[0, 0, 1, 1, 2, -1], [0, 0, -1, -1, -1, -1], [-1] * 6]


def test_a_picture_ends_where_the_next_begins_also_when_both_are_of_frame_zero() -> None:
    grid = torch.zeros(1, 4, 3, dtype=torch.int32)
    assert frame_segments(torch.tensor([[0, 0, 1, 1]]), grid).tolist() == [[0, 0, 1, 1]]
