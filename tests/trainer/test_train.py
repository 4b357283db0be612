"""Whole runs on a tiny data set: resume, refusals, the command line, two processes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.dataset import open_dataset
from shared.files import lock_directory
from shared.geometry import Budget
from tests.distributed.launch import launch
from tests.trainer.batches import GEOMETRY, Picture, make_batch
from tests.trainer.datasets import TOKENS, assemble, write_dataset
from trainer import train
from trainer.__main__ import main
from trainer.data.order import epoch_order
from trainer.parallel.mesh import open_world
from trainer.run import load_run_config, open_data, restore_model

BUDGET = Budget(S=24, N=2, L=16)
PACKS = [
    [[7 + i, Picture(4, 2, seed=i), 8, 9 + i], [10, 11 + i], [Picture(2, 2, seed=i), 12]] for i in range(10)
]
COUNTS = ("step", "labels", "tokens", "patches")
CONFIG = """
steps = 6
device = "cpu"
dtype = "float32"
[encoder]
type = "siglip2"
hidden_size = 16
intermediate_size = 32
num_layers = 1
num_heads = 2
patch_size = 2
[projector]
hidden_size = 32
[decoder]
vocab_size = 40
hidden_size = 24
intermediate_size = 48
num_layers = 1
num_heads = 2
num_kv_heads = 1
[batch]
packs_per_step = 4
packs_per_microbatch = 2
[schedule]
warmup_steps = 2
[checkpoint]
every = 3
[eval]
packs = 2
[log]
every = 2
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "set"
    return write_dataset(path, {"train": PACKS[:8], "validation": PACKS[8:]}, BUDGET)


@pytest.fixture
def command(tmp_path: Path, dataset: Path) -> list[str]:
    """A train command; its run directory is the last word."""
    (tmp_path / "config.toml").write_text(CONFIG)
    words = [
        "train",
        str(tmp_path / "config.toml"),
        "--dataset",
        str(dataset),
        "--out",
        str(tmp_path / "run"),
    ]
    return words


def rows(run: str | Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def weights(run: str | Path) -> dict[str, torch.Tensor]:
    config = load_run_config(Path(run))
    with open_world("cpu", "float32") as world:
        model, step = restore_model(config, open_data(config), world)
        assert step == 6
        return model.parts[0].state_dict()


def test_batches_built_by_hand_equal_those_of_the_loader() -> None:
    ours = make_batch(PACKS[:2], BUDGET)
    theirs = assemble(PACKS[:2], BUDGET)
    for field in fields(ours):
        assert torch.equal(getattr(ours, field.name), getattr(theirs, field.name)), field.name


def test_resuming_equals_an_uninterrupted_run_bit_for_bit(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = command[-1]
    assert main([*command[:-1], run + "-whole"]) == 0
    original = train.train_step

    def killed(model: Any, optimizer: Any, guard: Any, step: Any, *rest: Any, **settings: Any) -> Any:
        if step.index == 4:
            raise KeyboardInterrupt
        return original(model, optimizer, guard, step, *rest, **settings)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train_step", killed)
        main(command)
    (Path(run) / "checkpoints" / "step_00000005.tmp").mkdir()
    assert main(command) == 0
    whole, resumed = weights(run + "-whole"), weights(run)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    for one, other in zip(rows(run + "-whole"), rows(run), strict=True):
        for key in (*COUNTS, "loss", "grad_norm", "lr"):
            assert one[key] == other[key], key
    assert [path.name for path in sorted((Path(run) / "checkpoints").iterdir())] == [
        "step_00000003",
        "step_00000006",
    ]


def test_a_finished_run_is_evaluated_again_and_can_be_made_longer(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    first = capsys.readouterr().out
    assert "vision gain" in first and "from step 0" in first
    assert main([*command, "--json"]) == 0
    again = capsys.readouterr().out.splitlines()
    result = json.loads(again[-1])
    assert result["steps"] == 6 and "train" not in result
    (evaluation,) = rows(command[-1], "eval")
    assert evaluation["step"] == 6 and result["eval"]["loss"] == evaluation["loss"]
    assert "schedule" not in first and "schedule" not in "".join(again)
    assert main([*command, "--steps", "7"]) == 0
    assert [row["step"] for row in rows(command[-1], "eval")] == [6, 7]
    assert len(rows(command[-1])) == 7


def test_going_on_with_another_number_of_steps_says_what_becomes_of_the_learning_rate(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--steps", "3"]) == 0
    capsys.readouterr()
    assert main(command) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("schedule")]
    # The third of 3 steps, 2 of them warmup, is at the peak; the fourth of 6 is a third down the cosine:
    # 0.1 + 0.9 * (1 + cos(pi / 3)) / 2 = 0.775.
    assert "ends at step 6, it was on its way to 3: the learning rate goes from 1.00e-03 to 7.75e-04" in line


def test_a_run_that_was_moved_can_be_evaluated(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    moved = Path(command[-1]).rename(command[-1] + "-moved")
    capsys.readouterr()
    assert main(["eval", str(moved), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["step"] == 6 and result["vision_gain"] == rows(moved, "eval")[0]["vision_gain"]


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """A weight is nan while these steps compute, and itself again after them."""
    original = train.train_step

    def poisoned(model: Any, optimizer: Any, guard: Any, step: Any, *rest: Any, **settings: Any) -> Any:
        weight = model.parts[0].decoder.norm.weight.detach()
        kept = weight.clone()
        if step.index + 1 in steps:
            weight.fill_(math.nan)
        stats = original(model, optimizer, guard, step, *rest, **settings)
        if step.index + 1 in steps:
            weight.copy_(kept)
        return stats

    monkeypatch.setattr(train, "train_step", poisoned)


def test_a_step_without_a_finite_gradient_is_skipped_and_counted(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {4})
    assert main(command) == 0
    found = rows(command[-1])
    assert [row["skipped"] for row in found] == [0, 0, 0, 1, 0, 0]
    assert [row["skipped_in_all"] for row in found] == [0, 0, 0, 1, 1, 1]
    assert found[3]["loss"] is None and found[5]["loss"] < found[2]["loss"]
    assert all(value.isfinite().all() for value in weights(command[-1]).values())


def test_a_run_that_diverges_ends_before_a_checkpoint_of_it(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, {5, 6})
    assert main([*command, "--guard.max-consecutive", "1"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    packs = ", ".join(map(str, epoch_order(8, 0, 2)[4:]))  # positions 20 to 23, in epochs of 8
    assert "diverged: 2 steps skipped in all, 2 in a row" in error and "lower optimizer.lr" in error
    assert "among them 5, 6; at step 6 loss nan" in error and f"(split train: {packs})" in error
    checkpoints = sorted((Path(command[-1]) / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["step_00000003"]
    assert [row["step"] for row in rows(command[-1])] == [1, 2, 3, 4, 5, 6]


def test_a_chosen_step_leaves_a_trace_with_its_parts_named(command: list[str]) -> None:
    assert main([*command, "--profile.steps", "2"]) == 0
    [path] = (Path(command[-1]) / "profile").iterdir()
    names = [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]
    assert {"data", "forward", "backward", "optimizer"} <= set(names)
    assert path.name == "step_2_rank_0.json"


def test_the_loss_falls(command: list[str]) -> None:
    assert main([*command, "--steps", "40", "--optimizer.lr", "1e-2", "--checkpoint.every", "40"]) == 0
    losses = [row["loss"] for row in rows(command[-1])]
    assert losses[-1] < losses[0] - 1
    assert [row["tokens"] > 0 and row["patches"] == 4 * 12 for row in rows(command[-1])] == [True] * 40


def test_data_that_one_rank_cannot_read_ends_all_of_them(command: list[str], tmp_path: Path) -> None:
    path = write_dataset(
        tmp_path / "zstd", {"train": PACKS[:8], "validation": PACKS[8:]}, BUDGET, codec="zstd"
    )
    shard = path / "shards" / "train-00000.parquet"
    reader = open_dataset(path).locate("train", 3)[0]
    content = bytearray(shard.read_bytes())
    content[reader.byte_ranges(3)["patches"].stop - 3] ^= 0x20
    shard.write_bytes(content)
    words = [*command, "--dataset", str(path), "--batch.packs-per-microbatch", "1"]
    assert launch(main, 2, words) == [2, 2]


def test_two_processes_train_the_same_run_and_one_goes_on_with_it(command: list[str]) -> None:
    run = command[-1]
    alone = [*command[:-1], run + "-alone"]
    assert main(alone) == 0
    assert launch(main, 2, [*command, "--batch.packs-per-microbatch", "1"]) == [0, 0]
    for words in (alone, command):
        assert main([*words, "--steps", "8"]) == 0
    assert len(rows(run)) == 8
    for one, two in zip(rows(run + "-alone"), rows(run), strict=True):
        assert [one[key] for key in COUNTS] == [two[key] for key in COUNTS]
        assert abs(one["loss"] - two["loss"]) < 1e-4 and abs(one["grad_norm"] - two["grad_norm"]) < 1e-4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--optimizer.lr", "1"], "optimizer.lr was 0.001, is 1.0 here"),
        (["--decoder.num-layers", "2"], "decoder.num_layers was 1, is 2 here"),
        (["--seed", "3"], "seed was 0, is 3 here"),
        (["--batch.packs-per-step", "8"], "batch.packs_per_step was 4, is 8 here"),
    ],
)
def test_a_run_does_not_go_on_with_another_config(
    command: list[str], capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main([*command, "--steps", "3", "--schedule.warmup-steps", "2"]) == 0
    assert main([*command, *words]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and said in error[0] and "another --out" in error[0]


def test_a_run_does_not_go_on_with_another_data_set(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--steps", "3"]) == 0
    other = write_dataset(tmp_path / "other", {"train": PACKS[:4], "validation": PACKS[8:]}, BUDGET)
    assert main([*command, "--dataset", str(other)]) == 2
    assert "was trained on other data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tokens", "geometry", "said"),
    [
        ({"tokenizer_sha256": "ab"}, {}, "tokens.tokenizer_sha256 was , is ab here"),
        ({"eos": 7}, {}, "tokens.eos was 4, is 7 here"),
        ({}, {"mean": (0.5, 0.25, 0.5)}, "geometry.mean was [0.5, 0.5, 0.5], is [0.5, 0.25, 0.5] here"),
        ({}, {"filter": "bicubic"}, "geometry.filter was bilinear, is bicubic here"),
    ],
)
def test_a_run_is_not_evaluated_on_tokens_or_patches_that_mean_something_else(
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tokens: dict[str, Any],
    geometry: dict[str, Any],
    said: str,
) -> None:
    assert main([*command, "--steps", "3"]) == 0
    capsys.readouterr()
    other = write_dataset(
        tmp_path / "other",
        {"validation": PACKS[8:]},
        BUDGET,
        tokens=replace(TOKENS, **tokens),
        geometry=replace(GEOMETRY, **geometry),
    )
    assert main(["eval", command[-1], "--dataset", str(other)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and said in captured.err and captured.err.count(" was ") == 2


def test_a_run_is_evaluated_on_a_data_set_of_other_sizes(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--steps", "3"]) == 0
    other = write_dataset(
        tmp_path / "other",
        {"validation": PACKS[5:8]},
        Budget(S=32, N=1, L=20),
        geometry=replace(GEOMETRY, max_patches_per_image=32, resize="fill"),
    )
    assert main(["eval", command[-1], "--dataset", str(other)]) == 0
    assert "vision gain" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["train"], ["eval"]])
@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("run.json", None, "run.json: cannot be read (No such file or directory); restore it"),
        ("run.json", "{}", "run.json: lacks data, tokens, geometry"),
    ],
)
def test_a_damaged_run_directory_is_one_line(
    command: list[str],
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    file: str,
    content: str | None,
    said: str,
) -> None:
    assert main([*command, "--steps", "3"]) == 0
    path = Path(command[-1]) / file
    path.unlink() if content is None else path.write_text(content)
    assert main(command if words == ["train"] else ["eval", command[-1]]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert said in error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tran"], "unknown command 'tran'; did you mean 'train'?"),
        (["train", "missing.toml"], "config missing.toml: no such file"),
        (["train", "CONFIG", "--dataset", "nowhere"], "data set nowhere: no such directory"),
        (["train", "CONFIG", "--encoder.patch-size", "4"], "encoder.patch_size is 4, the data set has 2"),
        (["train", "CONFIG", "--decoder.vocab-size", "8"], "decoder.vocab_size is 8"),
        (["train", "CONFIG", "--batch.packs-per-step", "5"], "packs_per_step 5 is no multiple of 2"),
        (
            ["train", "CONFIG", "--trained", "encodr"],
            "trained: 'encodr' fits no parameter; did you mean 'encoder'?",
        ),
        (["train", "CONFIG", "--optimizer.lrr", "5"], "did you mean 'optimizer.lr'?"),
        (["eval", "nowhere"], "run nowhere: no config.toml there"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_exit_code_2(
    command: list[str], capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    words = [word for each in words for word in (command[1:] if each == "CONFIG" else [each])]
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1 and said in captured.err
    assert not Path(command[-1]).exists()


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_second_run_in_the_same_directory_is_refused_on_every_rank(
    command: list[str], capfd: pytest.CaptureFixture[str], num_processes: int
) -> None:
    run = Path(command[-1])
    words = [*command, "--batch.packs-per-microbatch", "1"]
    with lock_directory(run, "training"):
        # A rank that waited for one that has ended would sit out the 120 seconds of `launch`.
        codes = [main(words)] if num_processes == 1 else launch(main, num_processes, words)
        assert codes == [2] * num_processes
        assert [path.name for path in run.iterdir()] == [".lock"]
    assert capfd.readouterr().err.count("another process is training there") == num_processes
    assert main([*command, "--steps", "3"]) == 0


def test_a_run_that_goes_on_holds_its_directory(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, codes = train.train_step, []

    def meanwhile(*words: Any, **settings: Any) -> Any:
        monkeypatch.setattr(train, "train_step", original)
        codes.append(main(command))
        return original(*words, **settings)

    monkeypatch.setattr(train, "train_step", meanwhile)
    assert main(command) == 0 and codes == [2]
    assert len(rows(command[-1])) == 6


@pytest.mark.parametrize("below", ["", "below"])
def test_an_out_that_is_a_file_or_below_one_is_refused(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], below: str
) -> None:
    (tmp_path / "file").write_text("")
    assert main([*command[:-1], str(tmp_path / "file" / below)]) == 2
    assert "cannot be made or written to" in capsys.readouterr().err


def test_a_run_without_a_cuda_device_says_so(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    assert main([*command, "--device", "cuda"]) == 2
    assert "use --device cpu" in capsys.readouterr().err


def test_the_trainer_imports_neither_ray_nor_tokenizers_nor_the_other_stage() -> None:
    code = "import sys, trainer.train; print({'ray', 'tokenizers', 'preprocess'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_a_run_whose_last_update_ruins_the_weights_ends_before_a_checkpoint_keeps_them(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    ruin = ["--steps", "1", "--schedule.warmup_steps", "0", "--optimizer.lr", "1e38", "--json"]
    assert main([*command, *ruin]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "the validation loss after step 1 is nan" in error and "lower optimizer.lr" in error
    assert not (Path(command[-1]) / "checkpoints").exists()


def main_without_wandb(words: list[str]) -> tuple[int, list[str]]:
    """Exit code, and the threads of the loader that are left."""
    sys.modules["wandb"] = None  # pyright: ignore[reportArgumentType]  # what makes an import fail
    return main(words), [thread.name for thread in threading.enumerate() if thread.name == "loader"]


def test_what_fails_on_the_first_rank_after_the_loader_ends_every_rank_and_its_loader(
    command: list[str],
) -> None:
    words = [*command, "--batch.packs-per-microbatch", "1", "--log.wandb-project", "project"]
    assert launch(main_without_wandb, 2, words) == [(2, [])] * 2


def test_a_mixture_of_data_sets_trains_alike_on_one_process_and_on_two(
    command: list[str], tmp_path: Path
) -> None:
    entries = []
    for name, packs, weight in (("one", PACKS[:5], 3), ("other", PACKS[5:8], 1)):
        path = write_dataset(tmp_path / name, {"train": packs, "validation": PACKS[8:]}, BUDGET)
        entries.append(f'[mixture.{name}]\npath = "{path}"\nweight = {weight}\n')
    config = Path(command[1])
    config.write_text(config.read_text() + "\n" + "\n".join(entries))
    words = [word for word in command if word != "--dataset" and not word.endswith("/set")]
    alone = [*words[:-1], str(tmp_path / "alone")]
    assert main(alone) == 0
    assert launch(main, 2, [*words, "--batch.packs-per-microbatch", "1"]) == [0, 0]
    found, expected = rows(words[-1]), rows(alone[-1])
    sources = [name for name in expected[0] if name.startswith("loss/")]
    assert {name.split("/")[1] for name in sources} == {"one", "other"}
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["documents"] == theirs["documents"]
    [evaluation] = rows(alone[-1], "eval")
    assert evaluation["loss"] is not None and set(sources) <= set(evaluation)


def test_rows_say_what_the_run_has_seen_over_all_its_starts(command: list[str]) -> None:
    assert main([*command, "--steps", "3"]) == 0
    assert main(command) == 0
    seen = {"tokens": 0, "images": 0}
    for row in rows(command[-1]):
        for name in seen:
            seen[name] += row[name]
            assert row[f"{name}_seen"] == seen[name] > 0, row["step"]
    for kind in ("eval", "checkpoint"):
        assert rows(command[-1], kind)[-1]["tokens_seen"] == seen["tokens"]
