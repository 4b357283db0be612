"""The run directory: what may change on the way, and starting from the weights of another run."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from shared.config import load_config
from shared.errors import UserError
from tests.trainer.datasets import TOKENS, write_dataset
from tests.trainer.test_train import BUDGET, CONFIG, PACKS
from trainer.__main__ import main
from trainer.config import RunConfig
from trainer.parallel.mesh import World
from trainer.run import (
    MAY_CHANGE,
    find_checkpoint,
    load_start,
    new_model,
    open_data,
    restore_model,
    write_run,
)

ALONE = World(rank=0, size=1, device=torch.device("cpu"), mesh=None)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "set"
    return write_dataset(path, {"train": PACKS[:8], "validation": PACKS[8:]}, BUDGET)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """The directory of a finished run of 3 steps, its config beside it."""
    directory = tmp_path_factory.mktemp("first")
    (directory / "config.toml").write_text(CONFIG)
    words = ["--dataset", str(dataset), "--out", str(directory / "run"), "--steps", "3"]
    assert main(["train", str(directory / "config.toml"), *words]) == 0
    return directory / "run"


def config_of(first: Path, dataset: Path, out: Path, *words: str) -> RunConfig:
    path = first.parent / "config.toml"
    return load_config(RunConfig, path, ["--dataset", str(dataset), "--out", str(out), *words])


def start_config(first: Path, dataset: Path, *words: str) -> RunConfig:
    """Of another run that starts from the first one."""
    return config_of(first, dataset, first.with_name("second"), "--start.run", str(first), *words)


def test_a_run_starts_from_the_whole_model_of_another_run(first: Path, dataset: Path) -> None:
    config = start_config(first, dataset, "--seed", "9", "--optimizer.lr", "1", "--trained", "projector")
    data = open_data(config)
    model = new_model(config, data, ALONE)
    [line] = load_start(config, data, model.parts, ALONE)
    assert line.startswith("start") and line.endswith("step_00000003")
    theirs, step = restore_model(replace(config, out=str(first), seed=0), data, ALONE)
    assert step == 3
    for ours, its in zip(model.parts[0].parameters(), theirs.parts[0].parameters(), strict=True):
        assert torch.equal(ours, its)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        # The same names and shapes: only the config knows that the weights would compute something else.
        (["--decoder.rope-theta", "7000"], r"decoder\.rope_theta was \d+\.0, is 7000\.0 here"),
        (["--encoder.num-heads", "4"], r"encoder\.num_heads was 2, is 4 here"),
        (["--decoder.num-layers", "2"], r"decoder\.num_layers was 1, is 2 here"),
    ],
)
def test_a_run_does_not_start_from_a_model_that_computes_something_else(
    first: Path, dataset: Path, words: list[str], said: str
) -> None:
    config = start_config(first, dataset, *words)
    data = open_data(config)
    model = new_model(config, data, ALONE)
    with pytest.raises(
        UserError, match=rf"start\.run .* has another model: .*{said}.*start from another run"
    ):
        load_start(config, data, model.parts, ALONE)


def test_a_run_does_not_start_from_one_that_learned_other_tokens(
    first: Path, dataset: Path, tmp_path: Path
) -> None:
    other = write_dataset(tmp_path / "other", {"train": PACKS[:8]}, BUDGET, tokens=replace(TOKENS, eos=7))
    config = start_config(first, other)
    data = open_data(config)
    with pytest.raises(UserError, match=r"tokens\.eos was 4, is 7 here"):
        load_start(config, data, new_model(config, data, ALONE).parts, ALONE)


def test_a_run_does_not_start_from_one_without_a_checkpoint(
    first: Path, dataset: Path, tmp_path: Path
) -> None:
    config = config_of(first, dataset, tmp_path / "third", "--start.run", str(tmp_path / "third"))
    data = open_data(config)
    write_run(config, data)
    with pytest.raises(UserError, match="third: no complete checkpoint there; train it first"):
        load_start(config, data, [], ALONE)


@pytest.mark.parametrize(
    "words",
    [
        ["--decode-threads", "1"],
        ["--batch.packs-per-microbatch", "1"],
        ["--checkpoint.every", "1", "--log.every", "1"],
        ["--parallel.cp", "2", "--parallel.tp", "2"],
        ["--compute.recompute", "full"],
        ["--start.run", "elsewhere"],
    ],
)
def test_what_does_not_change_what_is_learned_may_change_on_the_way(
    first: Path, dataset: Path, words: list[str]
) -> None:
    config = config_of(first, dataset, first, *words)
    checkpoint = find_checkpoint(config, open_data(config).identity)
    assert checkpoint is not None and checkpoint.name == "step_00000003"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dtype", "bfloat16"], "dtype was float32, is bfloat16 here"),
        (["--trained", '["decoder"]'], "trained was .*, is .*decoder.* here"),
    ],
)
def test_what_changes_what_is_learned_is_refused(
    first: Path, dataset: Path, words: list[str], said: str
) -> None:
    config = config_of(first, dataset, first, *words)
    with pytest.raises(UserError, match=f"{said}; give another --out"):
        find_checkpoint(config, open_data(config).identity)


def test_every_key_of_the_config_says_what_is_learned_or_may_change() -> None:
    """A new key belongs on one of the two lists."""
    learned = {"trained", "z_loss", "seed", "dtype", "encoder", "projector", "decoder", "batch"}
    learned |= {"optimizer", "schedule", "guard"}
    assert {field.name for field in fields(RunConfig)} - MAY_CHANGE == learned


def test_a_run_does_not_go_on_with_other_data(first: Path, dataset: Path) -> None:
    with pytest.raises(UserError, match="was trained on other data, or with other weights"):
        find_checkpoint(config_of(first, dataset, first), "another identity")


def test_projector_first_then_all_is_two_configs(first: Path, dataset: Path) -> None:
    """The second run trains from the first one's weights, and goes on from its own once it has some."""
    out = first.with_name("all")
    words = ["train", str(first.parent / "config.toml"), "--dataset", str(dataset), "--start.run", str(first)]
    words += ["--out", str(out), "--schedule.warmup-steps", "0", "--optimizer.lr", "1e-9"]
    assert main([*words, "--steps", "1"]) == 0
    assert loss_after(out, 1) == pytest.approx(loss_after(first, 3), abs=1e-4)
    assert main([*words[:-4], "--schedule.warmup-steps", "0", "--optimizer.lr", "1e-9", "--steps", "2"]) == 0
    assert loss_after(out, 2) == pytest.approx(loss_after(first, 3), abs=1e-4)


def loss_after(run: Path, step: int) -> float:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    [loss] = [row["loss"] for row in rows if row["kind"] == "eval" and row["step"] == step]
    return loss
