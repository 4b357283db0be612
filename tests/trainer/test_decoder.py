"""What the decoder is beyond its parity with transformers: the exchange of keys, and sizes it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.trainer.batches import tiny_config
from trainer.attention import document_mask
from trainer.models.decoder import Decoder, DecoderConfig, RopeScalingConfig, rotary_frequencies


def test_keys_and_values_pass_through_the_exchange_of_each_layer() -> None:
    torch.manual_seed(0)
    decoder = Decoder(tiny_config(type="qwen3").decoder)
    h, positions = torch.randn(1, 6, 24), torch.arange(6)[None]
    whole = decoder(h, positions, document_mask(positions))

    # The second half of the positions alone: the exchange of each layer brings keys and values of the first.
    seen: list[tuple[Tensor, Tensor]] = []

    def record(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((k, v))
        return k, v

    for layer in decoder.layers.values():
        layer.self_attn.exchange = record
    decoder(h[:, :3], positions[:, :3], document_mask(positions[:, :3]))
    for layer, (first_k, first_v) in zip(decoder.layers.values(), seen, strict=True):
        layer.self_attn.exchange = lambda k, v, first_k=first_k, first_v=first_v: (
            torch.cat([first_k, k], dim=1),
            torch.cat([first_v, v], dim=1),
        )
    rest = decoder(h[:, 3:], positions[:, 3:], document_mask(positions)[:, :, 3:])
    assert torch.allclose(rest, whole[:, 3:], atol=1e-5)


def test_scaling_by_one_changes_no_rotation() -> None:
    plain, scaled = (
        rotary_frequencies(64, 500000.0, scaling, torch.device("cpu"))
        for scaling in (None, RopeScalingConfig(factor=1.0))
    )
    assert torch.allclose(plain, scaled, rtol=1e-6, atol=0)


def test_fast_rotations_are_kept_and_slow_ones_slowed_by_the_factor() -> None:
    # Pair k turns 8192 / (2 pi) * 500000^(-k/32) times in 8192 tokens: 1304 (k=0), 0.0039 (k=31).
    plain = rotary_frequencies(64, 500000.0, None, torch.device("cpu"))
    ratio = rotary_frequencies(64, 500000.0, RopeScalingConfig(factor=32.0), torch.device("cpu")) / plain
    assert ratio[0] == 1 and abs(ratio[31] * 32 - 1) < 1e-6
    # k=15 turns 2.777 times: 0.592 of the way from 1 to 4 times; 0.592 + 0.408 / 32 = 0.605.
    assert abs(ratio[15] - 0.605) < 1e-3


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"head_dim": 7}, "head_dim 7 must be even"),
        ({"num_kv_heads": 5}, "num_heads 32 is no multiple of num_kv_heads 5"),
        ({"rope_theta": 0.0}, "rope_theta must be above 0, got 0.0"),
    ],
)
def test_a_wrong_size_is_named(values: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DecoderConfig(**values)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"factor": 0.5}, "factor must be at least 1, got 0.5"),
        ({"factor": 8.0, "low_freq_factor": 4.0}, "low_freq_factor must lie between 0 and high_freq_factor"),
    ],
)
def test_a_wrong_scaling_is_named(values: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        RopeScalingConfig(**values)  # pyright: ignore[reportArgumentType]
