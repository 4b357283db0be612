"""FSDP on two processes against one process: loss, gradients, three steps, checkpoints, mixed precision.

Gradients are compared *normed*: the largest over parameters of |g - reference| / |all of reference|. A
relative error per parameter would compare noise with noise where a gradient is 0 by symmetry (k_proj.bias).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from shared.geometry import Budget
from tests.distributed.launch import launch
from tests.trainer.batches import GEOMETRY, Picture, make_batch, num_labels, tiny_config
from trainer.checkpoint import Checkpointer, complete_checkpoints, load_checkpoint
from trainer.data.batch import Batch
from trainer.data.counts import Counts
from trainer.data.loader import Step
from trainer.data.order import Imbalance
from trainer.models.vlm import VisionLanguageModel
from trainer.optim import OptimizerConfig, make_optimizer
from trainer.parallel.mesh import World, open_world
from trainer.parallel.parallelize import build_model
from trainer.step import backward, train_step

BUDGET = Budget(S=24, N=2, L=16)
# Four packs with different numbers of labels; the second half, all of rank 1, has a pack without a picture.
PACKS = [
    [[7, 8, Picture(4, 2), 9, 10, 11], [12, 13]],
    [[Picture(4, 4, seed=1), 14, 15]],
    [[16, 17, 18, 19, 20, 21, 22, 23, 24, 25]],
    [[Picture(2, 4, seed=2), 5], [6, Picture(2, 2, seed=3), 7]],
]
STEPS = 3


def build(world: World, dtype: str = "float32") -> VisionLanguageModel:
    return build_model(tiny_config(), GEOMETRY, world, dtype=dtype, seed=4)


def microbatches(world: World) -> list[Batch]:
    """Two microbatches per rank with two ranks, four with one; the same four packs."""
    mine = len(PACKS) // world.size
    return [make_batch([pack], BUDGET) for pack in PACKS[world.rank * mine : (world.rank + 1) * mine]]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def measure(dtype: str, factor: int, directory: str) -> dict[str, Any]:
    """Loss and gradients of one global batch, then the losses of three steps, then a checkpoint."""
    with open_world("cpu", dtype) as world:
        model, batches = build(world, dtype), microbatches(world)
        [labels] = world.sum_on_host([sum(map(num_labels, batches))])
        share = backward(model, batches, labels, dp_size=factor * world.dp_size)
        gradients = {name: whole(p.grad).clone() for name, p in model.named_parameters()}
        model.zero_grad()
        optimizer = make_optimizer(model, OptimizerConfig(lr=1e-2))
        curve = []
        for index in range(STEPS):
            counts = Counts.from_list([sum(map(num_labels, batches)), *[1] * 7])
            step = Step(index, batches, counts, Imbalance(1.0, 1.0), wait_s=0.0)
            stats = train_step(model, optimizer, step, world, lr=1e-2, max_grad_norm=0.5)
            curve.append([world.sum_on_device(stats.loss).item(), stats.grad_norm.item()])
        if directory:
            with Checkpointer(Path(directory), world, keep=1) as checkpointer:
                checkpointer.save([model], optimizer, {"step": STEPS})
        loss = world.sum_on_device(share).item()
        return {"loss": loss, "gradients": gradients, "curve": torch.tensor(curve), **state(model, optimizer)}


def state(model: VisionLanguageModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    moments = {name: whole(optimizer.state[p]["exp_avg_sq"]).clone() for name, p in model.named_parameters()}
    return {
        "weights": {name: whole(p).detach().clone() for name, p in model.named_parameters()},
        "moments": moments,
    }


def restore(directory: str) -> dict[str, Any]:
    """What a fresh model and optimizer hold after loading the checkpoint under this number of processes."""
    with open_world("cpu", "float32") as world:
        model = build_model(tiny_config(), GEOMETRY, world, dtype="float32", seed=99)
        optimizer = make_optimizer(model, OptimizerConfig(lr=1e-2))
        load_checkpoint(complete_checkpoints(Path(directory))[-1], [model], optimizer, world)
        return state(model, optimizer)


def normed_error(gradients: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    scale = torch.cat([g.flatten() for g in reference.values()]).norm()
    return max(((gradients[name] - reference[name]).norm() / scale).item() for name in reference)


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    return measure("float32", 1, "")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def two_processes(checkpoints: Path) -> list[dict[str, Any]]:
    return launch(measure, 2, "float32", 1, str(checkpoints))


def test_loss_and_gradients_on_two_processes_equal_one_process(
    one_process: dict[str, Any], two_processes: list[dict[str, Any]]
) -> None:
    for result in two_processes:
        assert abs(result["loss"] - one_process["loss"]) < 1e-5
        assert normed_error(result["gradients"], one_process["gradients"]) < 1e-6


def test_the_curve_of_three_clipped_steps_equals_one_process(
    one_process: dict[str, Any], two_processes: list[dict[str, Any]]
) -> None:
    assert one_process["curve"][2, 0] < one_process["curve"][0, 0]
    for result in two_processes:
        assert (result["curve"] - one_process["curve"]).abs().max() < 1e-4


def test_a_wrong_loss_factor_is_detected(one_process: dict[str, Any]) -> None:
    """Negative control: the comparison above must be able to fail."""
    [result, _] = launch(measure, 2, "float32", 2, "")
    assert abs(result["loss"] - one_process["loss"]) < 1e-5
    assert normed_error(result["gradients"], one_process["gradients"]) > 0.1


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_checkpoint_of_two_processes_loads_bit_for_bit_on_any_number(
    num_processes: int, two_processes: list[dict[str, Any]], checkpoints: Path
) -> None:
    restored = restore(str(checkpoints)) if num_processes == 1 else launch(restore, 2, str(checkpoints))[1]
    for part in ("weights", "moments"):
        for name, value in two_processes[0][part].items():
            assert torch.equal(restored[part][name], value), name


def test_bfloat16_in_one_process_keeps_float32_weights_and_a_close_loss(one_process: dict[str, Any]) -> None:
    [result] = launch(measure, 1, "bfloat16", 1, "")
    assert result["weights"]["decoder.norm.weight"].dtype == torch.float32
    # bfloat16 has 8 bits of mantissa: the third digit of the loss.
    assert 0 < abs(result["loss"] - one_process["loss"]) < 2e-2
    assert normed_error(result["gradients"], one_process["gradients"]) < 5e-2
