"""FLOPs of a step against torch's own counter, frozen parts, and the peak of devices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shared.geometry import Budget
from tests.trainer.batches import GEOMETRY, Picture, make_batch, tiny_config
from trainer.attention import segment_mask
from trainer.data.counts import Counts
from trainer.flops import ModelFlops, model_flops, peak_flops, peak_flops_of
from trainer.models.aimv2 import Aimv2Config
from trainer.models.init import init_parameters
from trainer.models.vision import frame_segments
from trainer.models.vlm import VisionLanguageModel
from trainer.optim import PARTS, freeze

BUDGET = Budget(S=24, N=2, L=16)
PACKS = [[[7, Picture(4, 2), 9, 10], [12, 13]], [[Picture(4, 4, seed=1), 14]]]
TOKENS, PATCHES = 2 * 24, 2 * 2 * 16  # with padding, all of which torch sees


def counted(trained: list[str], tied: bool) -> tuple[int, ModelFlops]:
    """What torch counts in forward and backward, and our rates for the same model."""
    model = VisionLanguageModel(tiny_config(tie_embeddings=tied), GEOMETRY)
    init_parameters(model, tiny_config(tie_embeddings=tied), seed=0)
    freeze([model], trained)
    batch = make_batch(PACKS, BUDGET)
    # The plain formula, whose products torch's counter sees one by one.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.logits(batch).sum().backward()
    return counter.get_total_flops(), model_flops(model, merge=2)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "trained",
    [
        [*PARTS],
        ["projector"],
        ["decoder"],
        ["projector", "decoder"],
        ["encoder"],
        ["encoder.layers.1.*"],
        ["decoder.layers.1.*"],
    ],
)
def test_flops_of_forward_and_backward_are_what_torch_counts(trained: list[str], tied: bool) -> None:
    total, rates = counted(trained, tied)
    ours = (
        rates.per_patch * PATCHES
        # All pairs of a row and of a pack: torch computes what the mask hides as well.
        + rates.per_patch_pair * 2 * 2 * 16**2
        + rates.per_token * TOKENS
        + rates.per_token_pair * 2 * 24**2
        + rates.per_label * TOKENS
    )
    # Resizing the table of positions, which is not counted: 4 * 4 entries of 16 values per patch, and its gradient.
    table = 2 * 4 * 4 * 16 * PATCHES * (2 if "encoder" in trained else 1)
    assert total == ours + table


def test_a_gated_encoder_takes_what_torch_counts() -> None:
    encoder = Aimv2Config(hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2, patch_size=2)
    config = replace(tiny_config(), encoder=encoder)
    model = VisionLanguageModel(config, GEOMETRY)
    init_parameters(model, config, seed=0)
    assert model.encoder is not None
    batch = make_batch(PACKS, BUDGET)
    segments_NL = frame_segments(batch.image_ids_NL, batch.grid_thw_NL3)
    mask = segment_mask(segments_NL, "sdpa")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        z_NLE = model.encoder(
            batch.pixel_values_NLP, batch.grid_thw_NL3, batch.image_sizes_NL2, segments_NL, mask
        )
        z_NLE.sum().backward()
    rates = model_flops(model, merge=2)
    projector = 6 * (64 * 32 + 32 * 24) / 4  # which is not run here
    assert (
        counter.get_total_flops()
        == (rates.per_patch - projector) * PATCHES + rates.per_patch_pair * 4 * 16**2
    )


def test_a_trained_model_takes_three_times_its_forward_and_a_frozen_encoder_one() -> None:
    with torch.device("meta"):
        model = VisionLanguageModel(tiny_config(), GEOMETRY)
    whole = model_flops(model, merge=2)
    freeze([model], ["projector", "decoder"])
    frozen = model_flops(model, merge=2)
    # Encoder: P = 12, E = 16, 32 in the MLP, 2 layers. Its first product has no gradient for the pixels.
    first, layers = 12 * 16, 2 * (4 * 16 * 16 + 2 * 16 * 32)
    # Per 4 patches; the layer norm before them is trained with them.
    projector_1, projector_2 = 64 * 32, 32 * 24
    assert whole.per_patch == 4 * first + 6 * layers + 6 * (projector_1 + projector_2) / 4
    assert frozen.per_patch == 2 * first + 2 * layers + 6 * (projector_1 + projector_2) / 4
    assert whole.per_patch_pair == 3 * frozen.per_patch_pair == 12 * 2 * 16
    # Decoder: D = 24, 4 heads and 2 for keys of K = 6, 48 in the MLP, 2 layers, 40 rows in the head.
    assert whole.per_token == frozen.per_token == 6 * 2 * (2 * 24 * 24 + 2 * 24 * 12 + 3 * 24 * 48)
    assert whole.per_token_pair == 12 * 2 * 24 and whole.per_label == 6 * 24 * 40


def test_documents_have_half_of_their_pairs_and_only_labels_a_head() -> None:
    rates = ModelFlops(per_patch=1.0, per_patch_pair=10.0, per_token=100.0, per_token_pair=1e3, per_label=1e6)
    counts = Counts(
        labels=2, tokens=5, patches=7, images=1, documents=2, token_pairs=3**2 + 2**2, patch_pairs=49,
        labels_per_source=np.array([2]),
    )  # fmt: skip
    # Documents of 3 and 2 tokens: 1 + 2 + 3 and 1 + 2 pairs.
    assert rates.of(counts) == 7 + 10 * 49 + 500 + 1e3 * 9 + 2e6


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("AMD Instinct MI300X", 1307e12),
        ("NVIDIA A1000", None),
        ("Quadro T2000", None),
    ],
)
def test_the_peak_of_a_device_goes_by_its_name(name: str, peak: float | None) -> None:
    assert peak_flops_of(name) == peak


def test_a_cpu_has_no_peak_unless_one_is_given() -> None:
    assert peak_flops(torch.device("cpu")) is None
    assert peak_flops(torch.device("cpu"), 1e11) == 1e11
