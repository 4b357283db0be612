"""Steps that are skipped: nothing moves, everything is counted, and a run that skips too much ends."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from shared.errors import UserError
from trainer.guard import Guard, GuardConfig, check_skipped, update_weights
from trainer.optim import OptimizerConfig, make_optimizer

CPU = torch.device("cpu")


def judge(guard: Guard, *norms: float) -> list[float]:
    return [guard.judge(torch.tensor(norm)).item() for norm in norms]


def test_a_norm_that_is_not_finite_is_skipped_and_stays_out_of_the_mean() -> None:
    guard = Guard(GuardConfig(), CPU)
    assert judge(guard, 2.0, math.nan, math.inf, 4.0) == [0, 1, 1, 0]
    # The mean of 2 and 4; 2 updates, 2 skipped, none in a row any more.
    assert guard.mean.item() == 3.0 and guard.counts.tolist() == [2, 2, 0]


def test_a_spike_is_skipped_once_the_mean_is_warm() -> None:
    guard = Guard(GuardConfig(spike_factor=3.0, warmup_steps=2), CPU)
    # 9 > 3 * 1, but after one update it may be; then the mean is 5, and 15 is no spike, 15.1 is one.
    assert judge(guard, 1.0, 9.0, 15.1, 15.0, 100.0, 101.0) == [0, 0, 1, 0, 1, 1]
    assert guard.counts.tolist() == [3, 3, 2]


def test_without_a_factor_no_finite_norm_is_a_spike() -> None:
    assert judge(Guard(GuardConfig(warmup_steps=0), CPU), 1.0, 1e30) == [0, 0]


def test_the_mean_forgets_after_fifty_updates() -> None:
    guard = Guard(GuardConfig(), CPU)
    judge(guard, *[1.0] * 60, 2.0)
    assert guard.mean.item() == pytest.approx(1.02)  # 0.98 * 1 + 0.02 * 2


def test_a_restored_guard_goes_on_bit_for_bit() -> None:
    config = GuardConfig(spike_factor=2.0, warmup_steps=3)
    norms = [1.0, 1.3, math.nan, 0.7, 5.0, 1.1, 0.9, math.inf, 2.0]
    whole, first, second = (Guard(config, CPU) for _ in range(3))
    decisions = judge(whole, *norms)
    before = judge(first, *norms[:5])
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    assert before + judge(second, *norms[5:]) == decisions
    assert torch.equal(second.mean, whole.mean) and torch.equal(second.counts, whole.counts)


def test_a_skipped_step_leaves_weights_moments_and_step_count_as_they_were() -> None:
    models = [torch.nn.Linear(3, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [make_optimizer([model], OptimizerConfig(lr=0.1)) for model in models]

    def step(i: int, gradient: float, skip: float) -> None:
        for parameter in models[i].parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        update_weights(optimizers[i], 0.1, torch.tensor(skip))
        assert all(parameter.grad is None for parameter in models[i].parameters())

    for gradient, skip in ((math.nan, 1.0), (0.5, 0.0), (math.nan, 1.0), (1e9, 1.0), (-0.25, 0.0)):
        step(0, gradient, skip)
    for gradient in (0.5, -0.25):
        step(1, gradient, 0.0)
    for mine, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(mine, other)
        state, expected = optimizers[0].state[mine], optimizers[1].state[other]
        assert state["step"].item() == 2.0
        assert all(torch.equal(state[name], expected[name]) for name in expected)


def row(step: int, skipped: int, in_all: int, in_a_row: int) -> dict[str, Any]:
    counts = {"skipped": skipped, "skipped_in_all": in_all, "skipped_in_a_row": in_a_row}
    return {"step": step, "loss": 2.5, "grad_norm": math.nan, "lr": 1e-3, **counts}


def check(*rows: dict[str, Any], **config: int) -> None:
    check_skipped(rows, GuardConfig(**config), lambda step: f"packs of {step}", "runs/x")


def test_a_run_goes_on_while_few_steps_are_skipped() -> None:
    check(row(1, 0, 0, 0))
    check(row(7, 1, 3, 2), row(8, 0, 3, 0), max_skipped=3, max_consecutive=2)


@pytest.mark.parametrize("limits", [{"max_skipped": 2}, {"max_consecutive": 1}])
def test_a_run_that_skips_too_much_ends_with_its_steps_and_packs_named(limits: dict[str, int]) -> None:
    with pytest.raises(UserError) as error:
        check(row(6, 1, 2, 1), row(7, 1, 3, 2), row(8, 0, 3, 0), **limits)
    message = str(error.value)
    assert "run runs/x: diverged: 3 steps skipped in all, 2 in a row" in message
    assert "among them 6, 7; at step 7 loss 2.5, gradient norm nan, learning rate 1.00e-03" in message
    assert "packs of step 7 (split train: packs of 7)" in message


@pytest.mark.parametrize("factor", [1.0, 0.5, -2.0])
def test_a_factor_that_would_skip_ordinary_steps_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="spike_factor must be above 1, or 0 for none"):
        GuardConfig(spike_factor=factor)
