"""The run directory: what may change on the way, and starting from the weights of another run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shared.config import load_config
from shared.dataset import open_dataset
from shared.errors import UserError
from tests.trainer.datasets import TOKENS, write_dataset
from tests.trainer.test_train import BUDGET, CONFIG, PACKS
from trainer.__main__ import main
from trainer.config import RunConfig
from trainer.parallel.mesh import World
from trainer.run import find_checkpoint, load_start, new_model, restore_model, write_run

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


def test_a_run_starts_from_the_whole_model_of_another_run(first: Path, dataset: Path, tmp_path: Path) -> None:
    data = open_dataset(dataset)
    config = config_of(first, dataset, tmp_path / "second", "--seed", "9", "--optimizer.lr", "1")
    model = new_model(config, data, ALONE)
    started = load_start(first, config, data, [model], ALONE)
    assert started.name == "step_00000003"
    theirs, step = restore_model(replace(config, out=str(first), seed=0), data, ALONE)
    assert step == 3
    for ours, its in zip(model.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(ours, its)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        # The same names and shapes: only the config knows that the weights would compute something else.
        (["--decoder.num-kv-heads", "2", "--decoder.num-heads", "4"], "decoder.num_heads was 2, is 4 here"),
        (["--encoder.num-heads", "4"], "encoder.num_heads was 2, is 4 here"),
        (["--decoder.num-layers", "2"], "decoder.num_layers was 1, is 2 here"),
    ],
)
def test_a_run_does_not_start_from_a_model_that_computes_something_else(
    first: Path, dataset: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    data, config = open_dataset(dataset), config_of(first, dataset, tmp_path / "second", *words)
    model = new_model(config, data, ALONE)
    with pytest.raises(UserError, match=f"start.run .* has another model: .*{said}.*start from another run"):
        load_start(first, config, data, [model], ALONE)


def test_a_run_does_not_start_from_one_that_learned_other_tokens(
    first: Path, dataset: Path, tmp_path: Path
) -> None:
    other = write_dataset(tmp_path / "other", {"train": PACKS[:8]}, BUDGET, tokens=replace(TOKENS, eos=7))
    data, config = open_dataset(other), config_of(first, other, tmp_path / "second")
    with pytest.raises(UserError, match=r"tokens\.eos was 4, is 7 here"):
        load_start(first, config, data, [new_model(config, data, ALONE)], ALONE)


def test_a_run_does_not_start_from_one_without_a_checkpoint(
    first: Path, dataset: Path, tmp_path: Path
) -> None:
    config = config_of(first, dataset, tmp_path / "second")
    write_run(config, open_dataset(dataset), "data")
    with pytest.raises(UserError, match="second: no complete checkpoint there; train it first"):
        load_start(tmp_path / "second", config, open_dataset(dataset), [], ALONE)


@pytest.mark.parametrize(
    "words",
    [
        ["--decode-threads", "1"],
        ["--batch.packs-per-microbatch", "1"],
        ["--checkpoint.every", "1", "--log.every", "1"],
    ],
)
def test_what_does_not_change_the_weights_may_change_on_the_way(
    first: Path, dataset: Path, words: list[str]
) -> None:
    config = config_of(first, dataset, first, *words)
    checkpoint = find_checkpoint(config, open_dataset(dataset).identity)
    assert checkpoint is not None and checkpoint.name == "step_00000003"


def test_a_run_does_not_go_on_in_another_precision(first: Path, dataset: Path) -> None:
    config = config_of(first, dataset, first, "--dtype", "bfloat16")
    with pytest.raises(UserError, match="dtype was float32, is bfloat16 here; give another --out"):
        find_checkpoint(config, open_dataset(dataset).identity)


def test_a_run_does_not_go_on_with_other_data(first: Path, dataset: Path) -> None:
    with pytest.raises(UserError, match="was trained on other data, or with other weights"):
        find_checkpoint(config_of(first, dataset, first), "another identity")
