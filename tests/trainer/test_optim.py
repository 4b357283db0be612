"""Learning rate, weight decay groups and clipping."""

from __future__ import annotations

import math

import pytest
import torch

from tests.trainer.batches import GEOMETRY, tiny_config
from trainer.models.init import init_parameters
from trainer.models.vlm import VisionLanguageModel
from trainer.optim import (
    OptimizerConfig,
    ScheduleConfig,
    clip_gradients,
    decay_groups,
    lr_factor,
    make_optimizer,
)


def test_learning_rate_warms_up_and_falls_by_a_cosine_to_its_final_ratio() -> None:
    schedule = ScheduleConfig(warmup_steps=4, final_ratio=0.2)
    factors = [lr_factor(step, 13, schedule) for step in range(13)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    # Steps 4 .. 12 are progress 0, 1/8 .. 1 of the cosine: the peak, half way at step 8, the end.
    assert factors[4] == 1.0 and factors[8] == pytest.approx(0.6) and factors[12] == pytest.approx(0.2)
    assert factors[5] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 8)) / 2)


def test_learning_rate_without_warmup_starts_at_the_peak_and_stays_low_after_the_end() -> None:
    schedule = ScheduleConfig(warmup_steps=0, final_ratio=0.0)
    assert lr_factor(0, 10, schedule) == 1.0 and lr_factor(50, 10, schedule) == 0.0
    assert lr_factor(0, 1, schedule) == 1.0


def test_matrices_decay_and_biases_norms_and_tables_do_not() -> None:
    model = VisionLanguageModel(tiny_config(), GEOMETRY)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in decay_groups(model, 0.1))
    assert decayed | kept == set(names.values()) and not decayed & kept
    tables = {"decoder.embed_tokens.weight", "encoder.position_embedding.weight"}
    assert tables <= kept
    assert all("norm" in name or name.endswith("bias") for name in kept - tables)
    assert not any("norm" in name or name.endswith("bias") for name in decayed)
    assert {
        "encoder.patch_embedding.weight",
        "projector.linear_2.weight",
        "decoder.lm_head.weight",
    } <= decayed


def test_weight_decay_reaches_only_its_group() -> None:
    model = VisionLanguageModel(tiny_config(), GEOMETRY)
    init_parameters(model, tiny_config(), seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = make_optimizer(model, OptimizerConfig(lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = model.state_dict()
    # Zero gradients: what is left is the decay, 1 - 0.1 * 0.5.
    assert torch.allclose(after["decoder.lm_head.weight"], before["decoder.lm_head.weight"] * 0.95)
    assert torch.equal(after["decoder.embed_tokens.weight"], before["decoder.embed_tokens.weight"])


@pytest.mark.parametrize(("max_norm", "factor"), [(1.0, 0.2), (100.0, 1.0)])
def test_clipping_scales_all_gradients_and_returns_the_norm_before(max_norm: float, factor: float) -> None:
    model = torch.nn.Linear(2, 2)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([0.0, 4.0])
    assert clip_gradients(model, max_norm).item() == pytest.approx(5.0)
    assert model.weight.grad[0, 0].item() == pytest.approx(3 * factor, rel=1e-5)
    assert model.bias.grad[1].item() == pytest.approx(4 * factor, rel=1e-5)
