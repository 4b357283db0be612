"""FLOPs that a step must take, exactly, for the tokens and patches of its documents; and what a device can do.

Counted are matrix products, 2 FLOPs per multiplication and addition, of the model as it is written:

    linear layers   2 * weights per position; the head only at positions with a label
    attention       4 * H * K per layer and pair of positions that attend to each other: scores and values

Forward, and of backward what is needed: as much again for the gradient of the weights that are trained, and as
much again for the gradient of the inputs where anything before them is trained. So a frozen encoder costs its
forward alone, a frozen decoder behind a trained projector two thirds.

Not counted: padding, computing again (checkpointing, flash attention, the head), class and register tokens of an
encoder, elementwise work, looking up and resizing tables. A pair is counted where the mask lets it attend: half
of a document's pairs and all of a frame's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from trainer.models.vlm import VisionLanguageModel

if TYPE_CHECKING:
    from trainer.data.counts import Counts

# What attention ends with, in every encoder and decoder here.
OUTPUT_PROJECTIONS = (".o_proj", ".out_proj")
# Dense bfloat16 FLOPs per second with float32 accumulation, of the vendors' data sheets (half of what they give
# with sparsity). The first entry whose words are all in the device's name counts.
PEAK_FLOPS = {
    "GB300": 2500e12,
    "GB200": 2500e12,
    "B300": 2250e12,
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI355X": 2500e12,
    "MI325X": 1307e12,
    "MI300X": 1307e12,
    "MI250X": 191.5e12,  # of one of its two dies, which is what torch calls a device
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFlops:
    """FLOPs of forward and backward per unit of each kind of work."""

    per_patch: float = 0.0
    per_patch_pair: float = 0.0
    per_token: float = 0.0
    per_token_pair: float = 0.0
    per_label: float = 0.0

    def of(self, counts: Counts) -> float:
        """FLOPs of what was counted; a document of n tokens has n (n + 1) / 2 pairs that attend."""
        return (
            self.per_patch * counts.patches
            + self.per_patch_pair * counts.patch_pairs
            + self.per_token * counts.tokens
            + self.per_token_pair * (counts.token_pairs + counts.tokens) / 2
            + self.per_label * counts.labels
        )


def model_flops(model: VisionLanguageModel, merge: int) -> ModelFlops:
    """Of a whole model, on any device, with `requires_grad` set as it is trained.

    The order in which modules are made is taken for that of computation: exact as long as the layers of a model
    are trained or frozen as wholes.
    """
    decoder = model.decoder
    assert model.encoder is not None and model.projector is not None and decoder.embed_tokens is not None
    head = decoder.embed_tokens if decoder.lm_head is None else decoder.lm_head
    counter = _Counter()
    encoder = counter.visit(model.encoder)
    projector = counter.visit(model.projector)
    counter.visit(decoder.embed_tokens)
    layers = counter.visit(decoder.layers)
    return ModelFlops(
        per_patch=encoder.linear + projector.linear / merge**2,
        per_patch_pair=encoder.attention,
        per_token=layers.linear,
        per_token_pair=layers.attention,
        per_label=counter.product(head.weight),
    )


class _Work(NamedTuple):
    linear: float
    """Per position."""
    attention: float
    """Per pair of positions."""


class _Counter:
    """Goes through the modules in order; knows whether anything before the next one is trained."""

    def __init__(self) -> None:
        self.trained_before = False

    def visit(self, root: nn.Module) -> _Work:
        linear = attention = 0.0
        for name, module in root.named_modules():
            if name.endswith(OUTPUT_PROJECTIONS):
                assert isinstance(module, nn.Linear)
                # Its input is what attention gives: H * K values. Backward has two products for each of the two.
                attention += 4 * module.in_features * (3 if self.trained_before else 1)
            if isinstance(module, nn.Linear):
                linear += self.product(module.weight)
            own = module.parameters(recurse=False)
            self.trained_before |= any(parameter.requires_grad for parameter in own)
        return _Work(linear, attention)

    def product(self, weight: Tensor) -> float:
        return 2 * weight.numel() * (1 + int(weight.requires_grad) + int(self.trained_before))


def peak_flops(device: torch.device, override: float = 0.0) -> float | None:
    """Dense bfloat16 FLOPs per second of a device; None where they are not known."""
    if override:
        return override
    return None if device.type != "cuda" else peak_flops_of(torch.cuda.get_device_name(device))


def peak_flops_of(device_name: str) -> float | None:
    """By the name that torch gives, such as "NVIDIA H100 80GB HBM3" or "NVIDIA H100 PCIe"."""
    words = device_name.replace("-", " ").split()
    if "Laptop" in words:  # another chip under the same name
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if set(name.split()) <= set(words)), None)
