"""One optimizer step: gradient accumulation is only a matter of memory."""

from __future__ import annotations

import torch

from shared.geometry import Budget
from tests.trainer.batches import GEOMETRY, Picture, make_batch, num_labels, tiny_config
from trainer.data.batch import Batch
from trainer.models.init import init_parameters
from trainer.models.vlm import VisionLanguageModel
from trainer.parallel.mesh import World
from trainer.parallel.parallelize import ParallelModel
from trainer.step import forward_backward

PACKS = [[[7, 8, Picture(4, 2), 9, 10, 11]], [[12, 13]], [[Picture(2, 4, seed=1), 15, 16]], [[5], [6, 7, 8]]]
BUDGET = Budget(S=16, N=1, L=8)


def loss_and_gradients(microbatches: list[Batch]) -> tuple[float, torch.Tensor]:
    model = VisionLanguageModel(tiny_config(), GEOMETRY)
    init_parameters(model, tiny_config(), seed=0)
    labels = sum(map(num_labels, microbatches))
    world = World(rank=0, size=1, device=torch.device("cpu"), mesh=None)
    nll = forward_backward(
        ParallelModel(parts=[model]), microbatches, world, num_labels=labels, num_sources=1
    )
    return nll.sum().item() / max(1, labels), torch.cat([p.grad.flatten() for p in model.parameters()])


def test_every_split_into_microbatches_gives_the_same_loss_and_gradients() -> None:
    whole_loss, whole = loss_and_gradients([make_batch(PACKS, BUDGET)])
    for splits in ([PACKS[:2], PACKS[2:]], [[pack] for pack in PACKS]):
        loss, gradients = loss_and_gradients([make_batch(split, BUDGET) for split in splits])
        assert abs(loss - whole_loss) < 1e-5
        assert (gradients - whole).norm() / whole.norm() < 1e-6


def test_a_step_without_any_label_moves_nothing() -> None:
    loss, gradients = loss_and_gradients([make_batch([[[]]], BUDGET)])
    assert loss == 0 and gradients.eq(0).all()
