"""kill -9 in the middle of a checkpoint: what is there afterwards is one step, whole, whatever the moment."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def run_trials(directory: Path, trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for number in range(len(trials)):
        (directory / f"trial{number}").mkdir(parents=True)
    result = subprocess.run(
        [sys.executable, "-m", "tests.distributed.killing", str(directory), json.dumps(trials)],
        capture_output=True,
        text=True,
        timeout=120 + 15 * len(trials),
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def kill_points(directory: Path) -> list[list[str]]:
    """The files that each rank touches while it saves step 2, in order: a kill point before each."""
    [undisturbed] = run_trials(directory, [{"rank": 0, "at": 0, "steps": 2}])
    assert undisturbed["found"] == [[2, [2.0]]] and undisturbed["kept"] == ["step_00000002"]
    return undisturbed["touched"]


def check(result: dict[str, Any]) -> list[int]:
    """The steps of the complete checkpoints: at least one, each whole and of one step, nothing else after a restart."""
    assert result["found"], "no checkpoint is left"
    for step, values in result["found"]:
        assert values == [step]
    steps = [step for step, _ in result["found"]]
    assert result["kept"] == [f"step_{step:08d}" for step in steps]
    return steps


def test_torch_alone_mixes_two_steps_without_a_word_when_it_writes_over_a_checkpoint(tmp_path: Path) -> None:
    """The control: what a checkpoint in place would do, and that these trials would show it."""
    [result] = run_trials(tmp_path, [{"in_place": True}])
    [(_, values)] = result["found"]
    assert values == [1.0, 2.0]


def test_a_kill_while_files_are_written_renamed_or_removed_leaves_whole_checkpoints(tmp_path: Path) -> None:
    points = kill_points(tmp_path / "count")
    main, other = points
    chosen = [
        (1, 1 + next(i for i, point in enumerate(other) if point == "open __1_0.distcp")),
        (0, 1 + next(i for i, point in enumerate(main) if point == "open .metadata.tmp")),
        (0, 1 + next(i for i, point in enumerate(main) if point == "os.rename step_00000002.tmp")),
        (0, 1 + next(i for i, point in enumerate(main) if point == "os.rename step_00000001")),
        (0, len(main)),
    ]
    results = run_trials(tmp_path / "kill", [{"rank": r, "at": at, "steps": 2} for r, at in chosen])
    # Step 2 exists from its rename on; step 1 until it is renamed in its turn.
    assert [check(result) for result in results] == [[1], [1], [1], [1, 2], [2]]
    assert results[0]["left"] == ["step_00000001", "step_00000002.tmp"]


@pytest.mark.slow
def test_a_kill_at_every_touch_of_a_file_leaves_whole_checkpoints(tmp_path: Path) -> None:
    points = kill_points(tmp_path / "count")
    trials = [
        {"rank": rank, "at": at + 1, "steps": 2}
        for rank, touched in enumerate(points)
        for at in range(len(touched))
    ]
    steps = [check(result) for result in run_trials(tmp_path / "kill", trials)]
    assert len(steps) > 20 and steps[0] == [1]
    assert {tuple(each) for each in steps} >= {(1,), (1, 2), (2,)}


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_whole_checkpoints(tmp_path: Path) -> None:
    moments = random.Random(0)
    trials = [{"rank": 0, "at": 0, "steps": 1000, "seconds": moments.uniform(0, 1.5)} for _ in range(60)]
    newest = [max(check(result)) for result in run_trials(tmp_path, trials)]
    assert len(set(newest)) > 5
