"""A pipeline stage by itself, without processes; whole pipelines are in tests/distributed/test_layouts.py."""

from __future__ import annotations

import pytest
import torch

from shared.geometry import Budget
from tests.trainer.batches import GEOMETRY, Picture, make_batch, tiny_config
from trainer.models.init import init_parameters
from trainer.parallel.pipeline import StageModel


def test_a_stage_takes_one_microbatch_after_another_and_is_called_with_hidden_states_alone() -> None:
    """A number of the microbatch among its arguments would be moved to the device by FSDP, and read back."""
    config = tiny_config()
    stage = StageModel(config, GEOMETRY)
    init_parameters(stage, config, seed=0)
    budget = Budget(S=16, N=1, L=16)
    batches = [make_batch([[[5, Picture(2, 2), 6, 7]]], budget), make_batch([[[8, 9, 10, 11, 12]]], budget)]
    alone = []
    for batch in batches:
        stage.feed = iter([(batch, stage.masks(batch))])
        alone.append(stage())
    stage.feed = iter([(batch, stage.masks(batch)) for batch in batches])
    together = [stage(), stage()]
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    assert not torch.equal(together[0], together[1])
    with pytest.raises(StopIteration):
        stage()
