"""Rows of the metrics: what they hold, where they go, and what becomes of them when a killed run goes on."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from shared.errors import UserError
from tests.distributed.launch import launch
from trainer.console import Console, progress_line
from trainer.data.counts import Counts
from trainer.data.order import Imbalance
from trainer.flops import ModelFlops
from trainer.metrics import LogConfig, Measures, Reporter, StepStats, read_rows
from trainer.parallel.mesh import ParallelConfig, World, make_world
from trainer.trackers import Trackers, keep_rows

WORLD = World(rank=0, size=1, device=torch.device("cpu"), mesh=None)
# 2 FLOPs per token and 3 per patch: 100 tokens and 50 patches are 350.
MEASURES = Measures(
    sources=("captions", "chat"),
    lr_multipliers=(0.1, 1.0),
    step_tokens=125,
    step_patches=200,
    flops=ModelFlops(per_token=2.0, per_patch=3.0),
    peak_flops=1000.0,
)


def stats(step: int, *, share: float = 1.0, wait_s: float = 0.001, chat_labels: int = 1) -> StepStats:
    """3 labels (2 of captions with 2 * step nats, 1 of chat with `step` nats), of which a rank has `share`."""
    return StepStats(
        step=step,
        source_nll=torch.tensor([2.0 * step, 1.0 * step]) * share,
        part_norms=torch.tensor([2.0, 1.0, 2.0]),
        skipped=torch.tensor(float(step == 2)),
        guard_counts=torch.tensor([step, 1, 0]),
        lr=0.1,
        counts=Counts(
            labels=2 + chat_labels,
            tokens=100,
            patches=50,
            images=4,
            documents=5,
            token_pairs=0,
            patch_pairs=0,
            labels_per_source=np.array([2, chat_labels]),
        ),
        imbalance=Imbalance(1.25, 1.5),
        wait_s=wait_s,
    )


def make_reporter(tmp_path: Path, console: Console, **changes: Any) -> Reporter:
    steps = {"start_step": 0, "total_steps": 10, **changes}
    log = LogConfig(print_every=steps.pop("print_every", 2))
    return Reporter(tmp_path, WORLD, console, MEASURES, log, **steps)


def test_a_row_holds_what_its_step_was() -> None:
    first, second = read_rows([stats(1), stats(2, wait_s=0.25)], 2.0, WORLD, MEASURES)
    assert first["step"] == 1 and first["loss"] == 1.0 and second["loss"] == 2.0
    assert second["loss/captions"] == 2.0 and second["loss/chat"] == 2.0
    # sqrt(2^2 + 1^2 + 2^2)
    assert second["grad_norm"] == 3.0 and second["grad_norm/projector"] == 1.0
    assert second["lr"] == 0.1 and second["lr/x0.1"] == pytest.approx(0.01) and second["lr/x1"] == 0.1
    assert second["fill_tokens"] == 0.8 and second["fill_patches"] == 0.25
    assert second["cost_imbalance"] == 1.25 and second["cost_imbalance_microbatch"] == 1.5
    assert (first["skipped"], second["skipped"], second["skipped_in_all"]) == (0, 1, 1)
    assert first["data_wait_s"] == pytest.approx(0.001) and second["data_wait_s"] == 0.25
    # Two steps in 2 seconds.
    assert second["tokens_per_s"] == 100 and second["tokens_per_s_all"] == 125
    assert second["patches_per_s"] == 50 and second["patches_per_s_all"] == 200
    assert second["mfu"] == pytest.approx(0.35)
    assert second["memory_gb"] > 0.01
    json.dumps(second)


def test_a_source_without_labels_has_no_loss_and_one_source_needs_none_of_its_own() -> None:
    [row] = read_rows([stats(1, chat_labels=0)], 1.0, WORLD, MEASURES)
    assert row["loss/captions"] == 1.0 and row["loss/chat"] is None
    alone = Measures(
        sources=("captions",), lr_multipliers=(1.0,), step_tokens=1, step_patches=1, flops=ModelFlops(), peak_flops=None
    )  # fmt: skip
    one = stats(1)
    object.__setattr__(one, "source_nll", torch.tensor([3.0]))
    [row] = read_rows([one], 1.0, WORLD, alone)
    assert row["loss"] == 1.0 and row["mfu"] is None
    assert not [name for name in row if name.startswith(("loss/", "lr/"))]


def rows_of_two_ranks() -> list[dict[str, Any]]:
    dist.init_process_group("gloo")
    try:
        world = make_world(dist.get_rank(), 2, torch.device("cpu"), ParallelConfig())
        mine = [stats(step, share=0.25 + 0.5 * world.rank, wait_s=0.25 * (1 + world.rank)) for step in (1, 2)]
        return read_rows(mine, 2.0, world, MEASURES)
    finally:
        dist.destroy_process_group()


def test_ranks_add_their_losses_and_the_slowest_and_the_fullest_is_shown() -> None:
    one, other = launch(rows_of_two_ranks, 2)
    assert one == other
    assert one[1]["loss"] == 2.0 and one[1]["loss/chat"] == 2.0
    assert one[0]["data_wait_s"] == 0.5
    assert one[0]["tokens_per_s"] == 100 and one[0]["mfu"] == pytest.approx(0.175)


def test_every_step_has_its_row_and_lines_that_stay_come_seldom(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reporter = make_reporter(tmp_path, Console(enabled=True))
    reporter.interval_start -= 2.0
    for step in (1, 2):
        reporter.add(stats(step))
    newest = reporter.flush()[-1]
    reporter.write_row(2, {"loss": 1.0, "vision_gain": 0.5}, kind="eval")
    for step in (3, 4):
        reporter.add(stats(step))
        reporter.flush()
    reporter.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["step"], row["loss"]) for row in rows] == [
        ("train", 1, 1.0),
        ("train", 2, 2.0),
        ("eval", 2, 1.0),
        ("train", 3, 3.0),
        ("train", 4, 4.0),
    ]
    # 200 tokens in the 2 seconds of the interval.
    assert newest["tokens_per_s"] == pytest.approx(100, rel=0.05)
    assert newest["step_s"] == pytest.approx(1, rel=0.05)
    # Read after steps 2, 3 and 4; printed after every second step.
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step  2/10  loss 2.0000  grad 3.000  lr 1.00e-01")
    assert second.startswith("step  4/10")
    assert list((tmp_path / "tensorboard").iterdir())


def test_rows_after_the_resumed_step_and_a_torn_line_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [f'{{"kind": "{kind}", "step": {step}}}\n' for step in (1, 2, 3) for kind in ("train", "eval")]
    path.write_text("".join(rows) + '{"st')
    assert keep_rows(path, 2, evaluated_again=False) == 1
    assert path.read_text() == "".join(rows[:4])
    assert keep_rows(path, 2, evaluated_again=True) == 0
    assert path.read_text() == "".join(rows[:3])


def test_damaged_rows_are_dropped_with_their_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    good = '{"kind": "train", "step": 1}\n'
    path.write_bytes(good.encode() + b'{"kind": "tr\x00\xff\n{}\n[1]\n{"kind": "eval", "step": "x"}\n')
    make_reporter(tmp_path, Console(enabled=True), start_step=1, total_steps=2).close()
    assert path.read_text() == good
    assert capsys.readouterr().out == f"metrics   dropped 4 damaged lines of {path}\n"


ROW: dict[str, Any] = {
    **dict.fromkeys(
        ["loss", "grad_norm", "lr", "tokens_per_s", "patches_per_s", "data_wait_s", "memory_gb"], 1.0
    ),
    "mfu": None,
    "skipped_in_all": 0,
}


def test_progress_line_tells_the_time_left() -> None:
    line = progress_line({**ROW, "step": 40}, step=40, total_steps=100, step_s=1.5)
    assert line.startswith("step  40/100  loss 1.0000") and line.endswith(
        "mem 1.0 GB  wait 1000.0 ms  left 1:30"
    )
    busy = {**ROW, "step": 40, "mfu": 0.415, "skipped_in_all": 3}
    line = progress_line(busy, step=40, total_steps=100, step_s=150.0)
    assert "  mfu 41.5%  mem" in line and line.endswith("skipped 3  left 2:30:00")


def test_the_live_line_names_the_step_that_its_loss_is_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console, shown = Console(enabled=True), []
    monkeypatch.setattr(console, "redraw", shown.append)
    reporter = make_reporter(tmp_path, console, total_steps=9, print_every=9)
    for step in (1, 2):
        reporter.add(stats(step))
    reporter.flush()
    reporter.add(stats(3))
    reporter.close()
    read, ahead = shown
    assert read.startswith("step 2/9  loss 2.0000") and "not read yet" not in read
    assert ahead.startswith("step 2/9  loss 2.0000") and ahead.endswith("(step 3 done, not read yet)")


def test_the_time_left_is_of_a_smoothed_step_time_and_rates_are_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console, shown, now = Console(enabled=True), [], [0.0]
    monkeypatch.setattr(console, "redraw", shown.append)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    reporter = make_reporter(tmp_path, console, total_steps=103, print_every=999)
    rates = []
    for first, seconds in ((1, 1.0), (2, 11.0)):
        reporter.add(stats(first))
        now[0] += seconds
        shown.clear()
        rates.append(reporter.flush()[-1]["tokens_per_s"])
    for step in (3, 4):
        reporter.add(stats(step))
    now[0] += 2.0
    reporter.flush()
    reporter.close()
    assert rates == [100 / 1.0, 100 / 11.0]
    # 0.95 * 1 + 0.05 * 11 = 1.5 after step 2; 0.95 ** 2 * 1.5 + (1 - 0.95 ** 2) * 1 = 1.45125 after step 4.
    assert "left 2:32" in shown[0]  # 101 * 1.5 = 151.5
    assert "left 2:24" in shown[-1]  # 99 * 1.45125 = 143.7


def test_what_is_not_finite_or_not_measured_is_null_and_no_point(tmp_path: Path) -> None:
    files = Trackers(tmp_path, start_step=0)
    points = []
    files.board.add_scalar = lambda *point: points.append(point)
    files.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.5, "gain": None}, kind="train")
    files.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert "NaN" not in line and "Infinity" not in line
    row = {"kind": "train", "step": 1, "loss": None, "grad_norm": None, "lr": 0.5, "gain": None}
    assert json.loads(line) == row
    assert points == [("train/lr", 0.5, 1)]


def test_weights_and_biases_gets_the_points_under_their_step_and_goes_on_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real package where it is installed, without a network: what it would have sent is in its directory."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    directory, identities = tmp_path / "run-7", set()
    for start_step in (0, 1):
        directory.mkdir(exist_ok=True)
        trackers = Trackers(directory, start_step=start_step, wandb_project="project", config={"lr": 0.5})
        run = trackers.wandb
        trackers.write(
            {"step": start_step + 1, "loss": 2.5, "mfu": None, "grad_norm": math.nan}, kind="train"
        )
        sent = {name: value for name, value in dict(run.summary).items() if not name.startswith("_")}
        assert sent == {"train/loss": 2.5, "step": start_step + 1}
        assert (run.name, run.project, dict(run.config)) == (f"{tmp_path.name}-run-7", "project", {"lr": 0.5})
        identities.add(run.id)
        trackers.close()
    [identity] = identities
    assert identity.startswith("run-7-") and list((directory / "wandb").glob(f"offline-run-*-{identity}"))


def test_a_project_without_the_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        UserError, match=r"log\.wandb_project 'project': the package wandb is not installed; pip"
    ):
        Trackers(tmp_path, start_step=0, wandb_project="project")
