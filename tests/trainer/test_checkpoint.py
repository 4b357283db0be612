"""Checkpoints are complete or absent, and belong to one model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from shared.errors import UserError
from shared.geometry import Budget
from tests.trainer.batches import GEOMETRY, Picture, make_batch, num_labels, tiny_config
from trainer.checkpoint import complete_checkpoints, load_checkpoint, remove_incomplete, save_checkpoint
from trainer.models.init import init_parameters
from trainer.models.vlm import ModelConfig, VisionLanguageModel
from trainer.optim import OptimizerConfig, make_optimizer
from trainer.parallel.mesh import World
from trainer.step import backward

WORLD = World(rank=0, size=1, device=torch.device("cpu"), mesh=None)


def make_trained(
    seed: int, config: ModelConfig | None = None
) -> tuple[VisionLanguageModel, torch.optim.AdamW]:
    """A model and an optimizer after one step."""
    config = config or tiny_config()
    model = VisionLanguageModel(config, GEOMETRY)
    init_parameters(model, config, seed=seed)
    optimizer = make_optimizer(model, OptimizerConfig())
    batch = make_batch([[[7, 8, Picture(2, 4), 9]]], Budget(S=16, N=1, L=8))
    backward(model, [batch], num_labels(batch), dp_size=1)
    optimizer.step()
    return model, optimizer


def test_model_and_optimizer_come_back_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = make_trained(seed=1)
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 7}, WORLD, keep=2)
    other, other_optimizer = make_trained(seed=2)
    assert load_checkpoint(path, other, other_optimizer, WORLD) == {"step": 7}
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        for key, value in optimizer.state[ours].items():
            assert torch.equal(value, other_optimizer.state[theirs][key])


def test_a_model_alone_can_be_loaded(tmp_path: Path) -> None:
    model, optimizer = make_trained(seed=1)
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 7}, WORLD, keep=2)
    other, _ = make_trained(seed=2)
    load_checkpoint(path, other, None, WORLD)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_only_the_newest_are_kept_and_their_state_is_small(tmp_path: Path) -> None:
    model, optimizer = make_trained(seed=1)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, model, optimizer, {"step": step}, WORLD, keep=2)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000002", "step_00000003"]
    state = tmp_path / "step_00000003" / "state.json"
    assert json.loads(state.read_text()) == {"step": 3} and state.stat().st_size < 1024


def test_what_a_killed_run_left_is_not_complete_and_is_removed(tmp_path: Path) -> None:
    model, optimizer = make_trained(seed=1)
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 7}, WORLD, keep=2)
    path.rename(path.with_suffix(".tmp"))
    assert complete_checkpoints(tmp_path) == []
    remove_incomplete(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_leaves_no_complete_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = make_trained(seed=1)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.checkpoint.write_json", fail)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, model, optimizer, {"step": 7}, WORLD, keep=2)
    assert complete_checkpoints(tmp_path) == [] and (tmp_path / "step_00000007.tmp").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_layers": 3}, r"lacks model\.decoder\.layers\.2\.input_layernorm\.weight.* and .* more"),
        ({"num_layers": 1}, r"has unknown .*decoder\.layers\.1"),
        ({"intermediate_size": 40}, r"mlp\.\w+_proj\.weight has shape \[.*48.*\], the model has \[.*40.*\]"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_name(
    tmp_path: Path, change: dict[str, int], named: str
) -> None:
    path = save_checkpoint(tmp_path, *make_trained(seed=1), {"step": 7}, WORLD, keep=2)
    with pytest.raises(UserError, match=named):
        load_checkpoint(path, make_trained(1, tiny_config(**change))[0], None, WORLD)


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("kept", [0.0, 0.5, None])
def test_a_damaged_checkpoint_is_named_with_the_way_on(tmp_path: Path, file: str, kept: float | None) -> None:
    path = save_checkpoint(tmp_path, *make_trained(seed=1), {"step": 7}, WORLD, keep=2)
    whole = (path / file).read_bytes()
    if kept is None:
        (path / file).unlink()
    else:
        (path / file).write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(UserError, match=r"step_00000007 is damaged .*delete it to go on from the checkpoint"):
        load_checkpoint(path, *make_trained(seed=2), WORLD)


def test_a_checkpoint_without_its_state_is_named_with_the_way_on(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, *make_trained(seed=1), {"step": 7}, WORLD, keep=2)
    (path / "state.json").unlink()
    with pytest.raises(UserError, match=r"state\.json: cannot be read .*delete .*step_00000007 to go on"):
        load_checkpoint(path, *make_trained(seed=2), WORLD)
