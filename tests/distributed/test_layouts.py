"""Every parallel layout computes what one process computes: loss, gradients, and the losses of three steps.

A launch runs many layouts. Gradients are compared *normed*: the largest over parameters of
|g - reference| / |all of reference|. A relative error per parameter would compare noise with noise where a
gradient is 0 by symmetry (k_proj.bias). What is easily forgotten is spoiled on purpose, and must be found.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch

from tests.distributed.launch import launch
from tests.distributed.layouts import ALONE, Layout, measure, measure_all
from trainer.parallel.mesh import ParallelConfig as Parallel
from trainer.parallel.parallelize import ComputeConfig as Compute

LOSS, GRADIENT, CURVE = 1e-5, 1e-6, 1e-4
# bfloat16 has 8 bits: a product is off by 0.4 %.
LOSS_BF16, GRADIENT_BF16, CURVE_BF16 = 2e-3, 5e-2, 2e-2

TWO = [
    Layout(name="dp", packs_per_microbatch=2),
    Layout(name="hsdp", parallel=Parallel(dp_replicate=2)),
    Layout(name="dp, each microbatch reduced", compute=Compute(reduce="microbatch")),
    Layout(name="cp", parallel=Parallel(cp=2), packs_per_microbatch=2),
    Layout(name="tp", parallel=Parallel(tp=2, sequence_parallel=False)),
    Layout(name="tp sp", parallel=Parallel(tp=2)),
    Layout(
        name="tp sp qwen3 tied", parallel=Parallel(tp=2), decoder={"type": "qwen3", "tie_embeddings": True}
    ),
    Layout(name="pp", parallel=Parallel(pp=2)),
    Layout(name="pp interleaved", parallel=Parallel(pp=2, stages_per_rank=2)),
    Layout(name="dp full recompute", compute=Compute(recompute="full")),
    Layout(name="cp selective recompute", parallel=Parallel(cp=2), compute=Compute(recompute="selective")),
    Layout(name="dp bf16", dtype="bfloat16"),
    Layout(name="dp, projector alone", trained=("projector",)),
    Layout(name="pp, projector alone", parallel=Parallel(pp=2), trained=("projector",)),
    Layout(name="cp, last layer alone", parallel=Parallel(cp=2), trained=("decoder.layers.3.*",)),
    Layout(name="tp, projector alone", parallel=Parallel(tp=2), trained=("projector",)),
    Layout(name="tp, without encoder", parallel=Parallel(tp=2), trained=("projector", "decoder")),
]
NEGATIVE = [
    Layout(name="no factor", negative="no factor"),
    Layout(name="factor of dp alone", parallel=Parallel(cp=2), negative="factor of dp alone"),
    Layout(name="shards over dp alone", parallel=Parallel(cp=2), negative="shards over dp alone"),
    Layout(name="gather without gradient", parallel=Parallel(cp=2), negative="gather without gradient"),
    Layout(
        name="heads normed without a sum",
        parallel=Parallel(tp=2),
        decoder={"type": "qwen3"},
        negative="heads normed without a sum",
    ),
]
FOUR = [
    Layout(name="dp, one rank without pictures"),
    Layout(name="dp cp", parallel=Parallel(cp=2)),
    Layout(name="dp tp", parallel=Parallel(tp=2)),
    Layout(name="cp tp", parallel=Parallel(cp=2, tp=2)),
    Layout(name="pp dp", parallel=Parallel(pp=2), packs_per_microbatch=2),
    Layout(name="pp cp", parallel=Parallel(pp=2, cp=2)),
    Layout(name="pp tp", parallel=Parallel(pp=2, tp=2)),
    Layout(name="hsdp tp", parallel=Parallel(dp_replicate=2, tp=2)),
    Layout(
        name="hsdp of two, each microbatch reduced",
        parallel=Parallel(dp_replicate=2),
        compute=Compute(reduce="microbatch"),
    ),
    Layout(name="tp selective", parallel=Parallel(tp=2), compute=Compute(recompute="selective")),
]
FOUR_SLOW = [
    Layout(name="hsdp of two", parallel=Parallel(dp_replicate=2)),
    Layout(name="hsdp cp", parallel=Parallel(dp_replicate=2, cp=2)),
    Layout(name="cp of four", parallel=Parallel(cp=4)),
    Layout(name="pp of four", parallel=Parallel(pp=4), packs_per_microbatch=2),
    Layout(name="pp uneven", parallel=Parallel(pp=2, stage_layers=(1, 3))),
    Layout(name="pp interleaved dp", parallel=Parallel(pp=2, stages_per_rank=2)),
    Layout(name="pp tp no sp", parallel=Parallel(pp=2, tp=2, sequence_parallel=False)),
    Layout(
        name="cp tp no sp tied",
        parallel=Parallel(cp=2, tp=2, sequence_parallel=False),
        decoder={"tie_embeddings": True},
    ),
    Layout(name="hsdp tp qwen3", parallel=Parallel(dp_replicate=2, tp=2), decoder={"type": "qwen3"}),
    Layout(name="cp tp selective", parallel=Parallel(cp=2, tp=2), compute=Compute(recompute="selective")),
    Layout(
        name="pp cp full bf16",
        parallel=Parallel(pp=2, cp=2),
        compute=Compute(recompute="full"),
        dtype="bfloat16",
    ),
]
EIGHT = [
    Layout(name="pp cp tp", parallel=Parallel(pp=2, cp=2, tp=2)),
    Layout(name="hsdp cp tp", parallel=Parallel(dp_replicate=2, cp=2, tp=2)),
    Layout(name="pp hsdp tp", parallel=Parallel(pp=2, dp_replicate=2, tp=2)),
]
COMPILED = [
    Layout(name="dp compiled", compute=Compute(compile=True)),
    Layout(
        name="cp compiled",
        parallel=Parallel(cp=2),
        compute=Compute(compile=True, recompute="selective"),
    ),
    Layout(name="tp compiled", parallel=Parallel(tp=2), compute=Compute(compile=True)),
]


def test_two_processes_equal_one_in_every_layout() -> None:
    check(2, TWO)


def test_what_is_easily_forgotten_makes_the_comparison_fail() -> None:
    for layout, difference in zip(NEGATIVE, differences(2, NEGATIVE), strict=True):
        assert difference["gradient"] > 1e-3, (layout.name, difference)


def test_four_processes_equal_one_in_every_layout() -> None:
    check(4, FOUR)


@pytest.mark.slow
def test_four_processes_equal_one_in_more_layouts() -> None:
    check(4, FOUR_SLOW)


@pytest.mark.slow
def test_eight_processes_equal_one_with_three_axes_at_once() -> None:
    check(8, EIGHT)


@pytest.mark.slow
def test_compiled_layers_equal_plain_ones() -> None:
    check(2, COMPILED)


def check(num_processes: int, layouts: Sequence[Layout]) -> None:
    wrong = {}
    for layout, difference in zip(layouts, differences(num_processes, layouts), strict=True):
        half = layout.dtype == "bfloat16"
        loss, gradient, curve = (LOSS_BF16, GRADIENT_BF16, CURVE_BF16) if half else (LOSS, GRADIENT, CURVE)
        limits = {"loss": loss, "evaluated": loss, "gradient": gradient, "curve": curve}
        if any(difference[name] > limit for name, limit in limits.items()):
            wrong[layout.name] = difference
    assert wrong == {}


def differences(num_processes: int, layouts: Sequence[Layout]) -> list[dict[str, float]]:
    results = launch(measure_all, num_processes, layouts)
    return [
        difference(
            [of_rank[number] for of_rank in results], reference(tuple(layout.decoder.items()), layout.trained)
        )
        for number, layout in enumerate(layouts)
    ]


@cache
def reference(decoder: tuple[tuple[str, Any], ...], trained: tuple[str, ...]) -> dict[str, Any]:
    return measure(Layout(name="one process", decoder=dict(decoder), trained=trained), ALONE)


def difference(ranks: Sequence[dict[str, Any]], one: dict[str, Any]) -> dict[str, float]:
    """Of all ranks the largest; pipeline ranks have the gradients of their own layers."""
    expected: dict[str, torch.Tensor] = one["gradients"]
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    found = [(name, gradient) for rank in ranks for name, gradient in rank["gradients"].items()]
    lost = [gradient.norm() for name, gradient in expected.items() if name not in dict(found)]
    off = [(gradient - expected[name]).norm() for name, gradient in found]

    def largest(name: str) -> float:
        return max((rank[name] - one[name]).abs().max().item() for rank in ranks)

    return {
        "loss": largest("nll"),
        "evaluated": largest("evaluated"),
        "gradient": (torch.stack([*off, *lost]).max() / total).item(),
        "curve": largest("curve"),
    }
