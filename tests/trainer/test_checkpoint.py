"""Checkpoints are complete or absent, and belong to one model."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shared.errors import UserError
from shared.files import file_checksum
from shared.geometry import Budget
from tests.trainer.batches import GEOMETRY, Picture, make_batch, num_labels, tiny_config
from trainer import checkpoint
from trainer.checkpoint import (
    CHECKSUMS,
    Checkpointer,
    complete_checkpoints,
    load_checkpoint,
    remove_incomplete,
)
from trainer.checkpoint_state import named_tensors, start_moments
from trainer.models.init import init_parameters
from trainer.models.vlm import ModelConfig, VisionLanguageModel
from trainer.optim import OptimizerConfig, make_optimizer
from trainer.parallel.mesh import World

WORLD = World(rank=0, size=1, device=torch.device("cpu"), mesh=None)


def make_trained(
    seed: int, config: ModelConfig | None = None
) -> tuple[VisionLanguageModel, torch.optim.AdamW]:
    """A model and an optimizer after one step."""
    config = config or tiny_config()
    model = VisionLanguageModel(config, GEOMETRY)
    init_parameters(model, config, seed=seed)
    optimizer = make_optimizer([model], OptimizerConfig())
    batch = make_batch([[[7, 8, Picture(2, 4), 9]]], Budget(S=16, N=1, L=8))
    (model(batch).sum() / num_labels(batch)).backward()
    optimizer.step()
    return model, optimizer


def write(
    directory: Path,
    model: VisionLanguageModel,
    optimizer: torch.optim.AdamW,
    state: dict[str, Any],
    *,
    keep: int,
    extra: dict[str, torch.Tensor] | None = None,
) -> Path:
    """A checkpoint, waited for."""
    with Checkpointer(directory, WORLD, keep=keep) as checkpointer:
        checkpointer.save([model], optimizer, state, extra)
    return directory / f"step_{state['step']:08d}"


def load(
    path: Path,
    model: VisionLanguageModel,
    optimizer: torch.optim.AdamW | None,
    extra: dict[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    return load_checkpoint(path, [model], optimizer, WORLD, extra)


def renew_checksums(path: Path) -> None:
    """What the files hold now is what was written: lets a change through to what reads them."""
    sums = json.loads((path / CHECKSUMS).read_text())
    (path / CHECKSUMS).write_text(json.dumps({name: file_checksum(path / name) for name in sums}))


def test_model_and_optimizer_come_back_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = make_trained(seed=1)
    path = write(tmp_path, model, optimizer, {"step": 7}, keep=2)
    other, other_optimizer = make_trained(seed=2)
    assert load(path, other, other_optimizer) == {"step": 7}
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        for key, value in optimizer.state[ours].items():
            assert torch.equal(value, other_optimizer.state[theirs][key])


def test_what_is_written_is_the_step_that_was_saved_although_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = make_trained(seed=1)
    guard = {"mean": torch.tensor([2.5])}
    then = {name: value.clone() for name, value in named_tensors([model], optimizer, guard).items()}
    go_on, original = threading.Event(), checkpoint.save

    def wait_and_save(*words: Any, **settings: Any) -> Any:
        assert go_on.wait(timeout=30)
        return original(*words, **settings)

    monkeypatch.setattr(checkpoint, "save", wait_and_save)
    with Checkpointer(tmp_path, WORLD, keep=2) as checkpointer:
        waited = checkpointer.save([model], optimizer, {"step": 7}, guard)
        guard["mean"].add_(1)
        optimizer.step()
        assert complete_checkpoints(tmp_path) == [] and not checkpointer.failed and waited < 30
        go_on.set()
    assert not torch.equal(model.decoder.lm_head.weight, then["model.decoder.lm_head.weight"])
    other, other_optimizer = make_trained(seed=2)
    other_guard = {"mean": torch.zeros(1)}
    assert load(tmp_path / "step_00000007", other, other_optimizer, other_guard) == {"step": 7}
    loaded = named_tensors([other], other_optimizer, other_guard)
    assert loaded.keys() == then.keys()
    assert all(torch.equal(loaded[name], value) for name, value in then.items())


def test_a_second_save_waits_for_the_first_and_returns_how_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, original = make_trained(seed=1), checkpoint.save

    def slow_save(*words: Any, **settings: Any) -> Any:
        time.sleep(0.5)
        return original(*words, **settings)

    monkeypatch.setattr(checkpoint, "save", slow_save)
    with Checkpointer(tmp_path, WORLD, keep=2) as checkpointer:
        first = checkpointer.save([trained[0]], trained[1], {"step": 1})
        second = checkpointer.save([trained[0]], trained[1], {"step": 2})
        assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000001"]
    assert first < 0.4 and second > 0.4
    assert len(complete_checkpoints(tmp_path)) == 2


@pytest.mark.parametrize("next_call", ["save", "finish", "end", "end after another failure"])
def test_a_failure_of_the_writer_is_one_line_at_the_next_call_and_never_lost(
    tmp_path: Path, next_call: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = make_trained(seed=1)
    (tmp_path / "checkpoints").touch()
    expected = KeyError if next_call == "end after another failure" else UserError
    with pytest.raises(expected) as caught:
        with Checkpointer(tmp_path / "checkpoints", WORLD, keep=2) as checkpointer:
            checkpointer.save([model], optimizer, {"step": 7})
            deadline = time.monotonic() + 30
            while not checkpointer.failed and time.monotonic() < deadline:
                time.sleep(0.01)
            assert checkpointer.failed
            if next_call == "save":
                checkpointer.save([model], optimizer, {"step": 8})
            elif next_call == "finish":
                checkpointer.finish()
            elif expected is KeyError:
                raise KeyError("another")
    said = caplog.messages[-1] if expected is KeyError else str(caught.value)
    assert "step_00000007 cannot be written" in said and "Not a directory" in said


def test_the_state_before_the_first_step_is_the_one_that_adamw_makes_itself(tmp_path: Path) -> None:
    for fused in (False, True):
        ours, theirs = (nn.Linear(2, 3) for _ in range(2))
        optimizers = [torch.optim.AdamW(model.parameters(), lr=0.0, fused=fused) for model in (ours, theirs)]
        start_moments(optimizers[0])
        for parameter in theirs.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizers[1].step()
        for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
            one, other = (optimizer.state[p] for optimizer, p in zip(optimizers, (mine, its), strict=True))
            assert one.keys() == other.keys() and one["step"] == 0 and other["step"] == 1
            assert all(one[key].dtype == other[key].dtype for key in one)
            assert all(torch.equal(one[key], other[key]) for key in ("exp_avg", "exp_avg_sq"))


def test_a_run_that_has_not_made_a_step_yet_can_be_saved_and_loaded(tmp_path: Path) -> None:
    config = tiny_config()
    model = VisionLanguageModel(config, GEOMETRY)
    init_parameters(model, config, seed=1)
    path = write(tmp_path, model, make_optimizer([model], OptimizerConfig()), {"step": 0}, keep=1)
    other, other_optimizer = make_trained(seed=2)
    load(path, other, other_optimizer)
    assert all(not state["exp_avg"].any() and state["step"] == 0 for state in other_optimizer.state.values())


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp", "state.json"])
def test_one_flipped_bit_in_any_file_is_found_and_the_file_named(tmp_path: Path, file: str) -> None:
    path = write(tmp_path, *make_trained(seed=1), {"step": 7}, keep=2)
    content = bytearray((path / file).read_bytes())
    content[len(content) // 2] ^= 1
    (path / file).write_bytes(content)
    with pytest.raises(
        UserError, match=rf"is damaged \(ValueError: {file} has checksum \w+, .*; delete it to go"
    ):
        load(path, *make_trained(seed=2))


def test_without_checksums_a_flipped_bit_of_a_weight_would_load_unnoticed(tmp_path: Path) -> None:
    """Why they are there: what the test above would show of torch alone."""
    model, optimizer = make_trained(seed=1)
    path = write(tmp_path, model, optimizer, {"step": 7}, keep=2)
    weight = model.decoder.lm_head.weight.detach()
    content = (path / "__0_0.distcp").read_bytes()
    at = content.index(weight.numpy().tobytes())
    (path / "__0_0.distcp").write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    renew_checksums(path)
    other, other_optimizer = make_trained(seed=2)
    load(path, other, other_optimizer)
    assert (other.decoder.lm_head.weight != weight).sum() == 1


def test_a_model_alone_can_be_loaded(tmp_path: Path) -> None:
    model, optimizer = make_trained(seed=1)
    path = write(tmp_path, model, optimizer, {"step": 7}, keep=2)
    other, _ = make_trained(seed=2)
    load(path, other, None)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_only_the_newest_are_kept_and_their_state_is_small(tmp_path: Path) -> None:
    model, optimizer = make_trained(seed=1)
    for step in (1, 2, 3):
        write(tmp_path, model, optimizer, {"step": step}, keep=2)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000002", "step_00000003"]
    state = tmp_path / "step_00000003" / "state.json"
    assert json.loads(state.read_text()) == {"step": 3} and state.stat().st_size < 1024


def test_what_a_killed_run_left_is_not_complete_and_is_removed(tmp_path: Path) -> None:
    model, optimizer = make_trained(seed=1)
    path = write(tmp_path, model, optimizer, {"step": 7}, keep=2)
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
        write(tmp_path, model, optimizer, {"step": 7}, keep=2)
    assert complete_checkpoints(tmp_path) == [] and (tmp_path / "step_00000007.tmp").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_layers": 3}, r"lacks model\.decoder\.layers\.2\.input_layernorm\.weight.* and .* more"),
        ({"num_layers": 1}, r"has unknown .*decoder\.layers\.1"),
        ({"intermediate_size": 40}, r"mlp\.\w+_proj\.weight of shape \[.*48.*\], the model has \[.*40.*\]"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_name(
    tmp_path: Path, change: dict[str, int], named: str
) -> None:
    path = write(tmp_path, *make_trained(seed=1), {"step": 7}, keep=2)
    with pytest.raises(UserError, match=named):
        load(path, make_trained(1, tiny_config(**change))[0], None)


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("kept", [0.0, 0.5, None])
def test_a_damaged_checkpoint_is_named_with_the_way_on(tmp_path: Path, file: str, kept: float | None) -> None:
    path = write(tmp_path, *make_trained(seed=1), {"step": 7}, keep=2)
    whole = (path / file).read_bytes()
    if kept is None:
        (path / file).unlink()
    else:
        (path / file).write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(UserError, match=r"step_00000007 is damaged .*delete it to go on from the checkpoint"):
        load(path, *make_trained(seed=2))


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
    path = write(tmp_path, *make_trained(seed=1), {"step": 7}, keep=2)
    replace(path / file)
    with pytest.raises(UserError, match=rf"step_00000007 cannot be read .*{reason}.*run again") as caught:
        load(path, *make_trained(seed=2))
    assert "damaged" not in str(caught.value) and "delete" not in str(caught.value)


def test_a_checkpoint_that_is_gone_as_a_whole_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step_00000007 cannot be read .*No such file"):
        load(tmp_path / "step_00000007", *make_trained(seed=2))


def test_too_little_memory_is_not_called_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, *make_trained(seed=1), {"step": 7}, keep=2)

    def want_an_exabyte(*_: object, **__: object) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr("trainer.checkpoint.load", want_an_exabyte)
    with pytest.raises(UserError, match=r"step_00000007 cannot be read .*; give it more memory"):
        load(path, *make_trained(seed=2))


def test_metadata_of_classes_that_this_torch_lacks_is_not_called_damaged(tmp_path: Path) -> None:
    path = write(tmp_path, *make_trained(seed=1), {"step": 7}, keep=2)
    known = (path / ".metadata").read_bytes()
    unknown = known.replace(b"TensorStorageMetadata", b"TensorStorageNewState")
    assert unknown != known
    (path / ".metadata").write_bytes(unknown)
    renew_checksums(path)
    with pytest.raises(UserError, match=r"TensorStorageNewState.*; read it with the torch that wrote it"):
        load(path, *make_trained(seed=2))


def test_a_defect_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, *make_trained(seed=1), {"step": 7}, keep=2)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("trainer.checkpoint.load", fail)
    with pytest.raises(RuntimeError, match="CUDA error: an illegal memory access") as caught:
        load(path, *make_trained(seed=2))
    assert not isinstance(caught.value, UserError)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata.tmp"])
def test_a_full_disk_is_one_line_and_the_checkpoints_before_stay(tmp_path: Path, file: str) -> None:
    trained = make_trained(seed=1)
    first = write(tmp_path, *trained, {"step": 7}, keep=1)
    (tmp_path / "step_00000009.tmp").mkdir()
    (tmp_path / "step_00000009.tmp" / file).symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"step_00000009 cannot be written .*No space left.*mend that"):
        write(tmp_path, *trained, {"step": 9}, keep=1)
    assert complete_checkpoints(tmp_path) == [first]
    assert load(first, *make_trained(seed=2)) == {"step": 7}


def test_a_state_that_cannot_be_written_is_a_defect_and_no_damage(tmp_path: Path) -> None:
    state: dict[str, object] = {"step": 9}
    state["itself"] = state
    with pytest.raises(ValueError, match="Circular") as caught:
        write(tmp_path, *make_trained(seed=1), state, keep=1)
    assert not isinstance(caught.value, UserError)


def test_a_file_where_the_directory_should_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match=r"step_00000009 cannot be written .*Not a directory"):
        write(tmp_path / "checkpoints", *make_trained(seed=1), {"step": 9}, keep=1)


@pytest.mark.parametrize("content", [None, "", "{"])
def test_a_checkpoint_without_its_state_is_named_with_the_way_on(tmp_path: Path, content: str | None) -> None:
    path = write(tmp_path, *make_trained(seed=1), {"step": 7}, keep=2)
    (path / "state.json").unlink()
    if content is not None:
        (path / "state.json").write_text(content)
    with pytest.raises(UserError, match=r"step_00000007 is damaged .*; delete it to go on"):
        load(path, *make_trained(seed=2))
