"""Checkpoints are complete or absent, and belong to one model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
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


def replace_by_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_a_link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp", "state.json"])
@pytest.mark.parametrize(
    ("replace", "reason"),
    [
        (replace_by_a_directory, "Is a directory"),
        (replace_by_a_link_to_itself, "Too many levels of symbolic links"),
        pytest.param(
            lambda path: path.chmod(0),
            "Permission denied",
            marks=pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read all"),
        ),
    ],
)
def test_what_cannot_be_read_now_is_not_called_damaged_and_nobody_is_told_to_delete_it(
    tmp_path: Path, file: str, replace: Callable[[Path], object], reason: str
) -> None:
    path = save_checkpoint(tmp_path, *make_trained(seed=1), {"step": 7}, WORLD, keep=2)
    replace(path / file)
    with pytest.raises(UserError, match=rf"step_00000007 cannot be read .*{reason}.*run again") as caught:
        load_checkpoint(path, *make_trained(seed=2), WORLD)
    assert "damaged" not in str(caught.value) and "delete" not in str(caught.value)


def test_a_checkpoint_that_is_gone_as_a_whole_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step_00000007 cannot be read .*No such file"):
        load_checkpoint(tmp_path / "step_00000007", *make_trained(seed=2), WORLD)


def test_too_little_memory_is_not_called_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_checkpoint(tmp_path, *make_trained(seed=1), {"step": 7}, WORLD, keep=2)

    def want_an_exabyte(*_: object, **__: object) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr("trainer.checkpoint.load", want_an_exabyte)
    with pytest.raises(UserError, match=r"step_00000007 cannot be read .*; give it more memory"):
        load_checkpoint(path, *make_trained(seed=2), WORLD)


def test_metadata_of_classes_that_this_torch_lacks_is_not_called_damaged(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, *make_trained(seed=1), {"step": 7}, WORLD, keep=2)
    known = (path / ".metadata").read_bytes()
    unknown = known.replace(b"TensorStorageMetadata", b"TensorStorageNewState")
    assert unknown != known
    (path / ".metadata").write_bytes(unknown)
    with pytest.raises(UserError, match=r"TensorStorageNewState.*; read it with the torch that wrote it"):
        load_checkpoint(path, *make_trained(seed=2), WORLD)


def test_a_defect_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_checkpoint(tmp_path, *make_trained(seed=1), {"step": 7}, WORLD, keep=2)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("trainer.checkpoint.load", fail)
    with pytest.raises(RuntimeError, match="CUDA error: an illegal memory access") as caught:
        load_checkpoint(path, *make_trained(seed=2), WORLD)
    assert not isinstance(caught.value, UserError)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata.tmp"])
def test_a_full_disk_is_one_line_and_the_checkpoints_before_stay(tmp_path: Path, file: str) -> None:
    trained = make_trained(seed=1)
    first = save_checkpoint(tmp_path, *trained, {"step": 7}, WORLD, keep=1)
    (tmp_path / "step_00000009.tmp").mkdir()
    (tmp_path / "step_00000009.tmp" / file).symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"step_00000009 cannot be written .*No space left.*mend that"):
        save_checkpoint(tmp_path, *trained, {"step": 9}, WORLD, keep=1)
    assert complete_checkpoints(tmp_path) == [first]
    assert load_checkpoint(first, *make_trained(seed=2), WORLD) == {"step": 7}


def test_a_state_that_cannot_be_written_is_a_defect_and_no_damage(tmp_path: Path) -> None:
    state: dict[str, object] = {"step": 9}
    state["itself"] = state
    with pytest.raises(ValueError, match="Circular") as caught:
        save_checkpoint(tmp_path, *make_trained(seed=1), state, WORLD, keep=1)
    assert not isinstance(caught.value, UserError)


def test_a_file_where_the_directory_should_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match=r"step_00000009 cannot be written .*Not a directory"):
        save_checkpoint(tmp_path / "checkpoints", *make_trained(seed=1), {"step": 9}, WORLD, keep=1)


@pytest.mark.parametrize("content", [None, "", "{"])
def test_a_checkpoint_without_its_state_is_named_with_the_way_on(tmp_path: Path, content: str | None) -> None:
    path = save_checkpoint(tmp_path, *make_trained(seed=1), {"step": 7}, WORLD, keep=2)
    (path / "state.json").unlink()
    if content is not None:
        (path / "state.json").write_text(content)
    with pytest.raises(UserError, match=r"step_00000007 is damaged .*; delete it to go on"):
        load_checkpoint(path, *make_trained(seed=2), WORLD)
