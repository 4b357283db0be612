"""Rows of the metrics, and what becomes of them when a killed run goes on."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch

from trainer.data.order import Imbalance
from trainer.metrics import Console, MetricFiles, Reporter, StepStats, keep_rows, progress_line
from trainer.parallel.mesh import World

WORLD = World(rank=0, size=1, device=torch.device("cpu"), mesh=None)


def stats(step: int) -> StepStats:
    return StepStats(
        step=step,
        loss=torch.tensor(float(step)),
        grad_norm=torch.tensor(2.0),
        lr=0.1,
        labels=3,
        tokens=100,
        patches=50,
        imbalance=Imbalance(1.25, 1.5),
        wait_s=0.001,
    )


def test_every_step_has_its_row_and_lines_that_stay_come_seldom(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reporter = Reporter(tmp_path, WORLD, Console(enabled=True), start_step=0, total_steps=10, print_every=2)
    reporter.interval_start -= 2.0
    for step in (1, 2):
        reporter.add(stats(step))
    newest = reporter.flush()[-1]
    reporter.write_evaluation(2, {"loss": 1.0, "vision_gain": 0.5})
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
    assert newest["tokens_per_s"] == pytest.approx(100, rel=0.05) and newest["step_s"] == pytest.approx(
        1, rel=0.05
    )
    assert {row["cost_imbalance"] for row in rows if row["kind"] == "train"} == {1.25}
    assert newest["cost_imbalance_microbatch"] == 1.5
    # Read after steps 2, 3 and 4; printed after every second step.
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step  2/10  loss 2.0000  grad 2.000  lr 1.00e-01")
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
    Reporter(tmp_path, WORLD, Console(enabled=True), start_step=1, total_steps=2, print_every=1).close()
    assert path.read_text() == good
    assert capsys.readouterr().out == f"metrics   dropped 4 damaged lines of {path}\n"


ROW = dict.fromkeys(["loss", "grad_norm", "lr", "tokens_per_s", "patches_per_s", "data_wait_s"], 1.0)


def test_progress_line_tells_the_time_left() -> None:
    line = progress_line({**ROW, "step": 40}, step=40, total_steps=100, step_s=1.5)
    assert line.startswith("step  40/100  loss 1.0000") and line.endswith("wait 1000.0 ms  left 1:30")


def test_the_live_line_names_the_step_that_its_loss_is_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console, shown = Console(enabled=True), []
    monkeypatch.setattr(console, "redraw", shown.append)
    reporter = Reporter(tmp_path, WORLD, console, start_step=0, total_steps=9, print_every=9)
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
    reporter = Reporter(tmp_path, WORLD, console, start_step=0, total_steps=103, print_every=999)
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
    files = MetricFiles(tmp_path, start_step=0)
    points = []
    files.board.add_scalar = lambda *point: points.append(point)
    files.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.5, "gain": None}, kind="train")
    files.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert "NaN" not in line and "Infinity" not in line
    row = {"kind": "train", "step": 1, "loss": None, "grad_norm": None, "lr": 0.5, "gain": None}
    assert json.loads(line) == row
    assert points == [("train/lr", 0.5, 1)]
