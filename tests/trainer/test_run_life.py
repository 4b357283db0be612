"""The life of real runs: asked to stop, killed, resumed by the same or another number of processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import free_port, launch
from tests.trainer.datasets import write_dataset
from tests.trainer.test_train import BUDGET, CONFIG, PACKS
from trainer import train
from trainer.__main__ import main
from trainer.data.loader import Step
from trainer.signals import EXIT_STOPPED, SIGNALS, listen

STEPS = 6
LAYOUTS = {"cp2": ["--parallel.cp", "2"], "tp2": ["--parallel.tp", "2"], "pp2": ["--parallel.pp", "2"]}
EXACT = ("step", "labels", "tokens", "patches", "loss", "grad_norm", "lr")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "set"
    return write_dataset(path, {"train": PACKS[:8], "validation": PACKS[8:]}, BUDGET)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> list[str]:
    """A train command; `--out DIRECTORY` is still to be said."""
    config = tmp_path_factory.mktemp("config") / "config.toml"
    config.write_text(CONFIG)
    divisible = [
        "--decoder.num-layers",
        "2",
        "--decoder.num-kv-heads",
        "2",
        "--decoder.tie-embeddings",
        "false",
    ]
    return ["train", str(config), "--dataset", str(dataset), "--batch.packs-per-microbatch", "1", *divisible]


def rows(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    # A line that a kill has cut short, or that is just being written, is none yet.
    return [row for row in map(json.loads, (x for x in lines if x.endswith("\n"))) if row["kind"] == kind]


def exact(run: Path) -> list[list[Any]]:
    return [[row[key] for key in EXACT] for row in rows(run)]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# ---- the same and another number of processes


def stop_after(step: int, rank: int, words: Sequence[str]) -> int:
    """Train until one rank has got SIGUSR1 in the middle of a step; returns the exit code."""
    original = train.train_step

    def interrupted(*words: Any, **settings: Any) -> Any:
        [each] = [word for word in words if isinstance(word, Step)]
        if each.index + 1 == step and int(os.environ.get("RANK", "0")) == rank:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(*words, **settings)

    train.train_step = interrupted
    try:
        return main(words)
    finally:
        train.train_step = original


def train_whole_and_half(ports: Sequence[int], whole: list[str], half: list[str]) -> list[int]:
    os.environ["MASTER_PORT"] = str(ports[0])
    code = main(whole)
    os.environ["MASTER_PORT"] = str(ports[1])
    return [code, stop_after(3, 1, half)]


def train_each(ports: Sequence[int], runs: Sequence[list[str]]) -> list[int]:
    codes: list[int] = []
    for port, words in zip(ports, runs, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        codes.append(main(words))
    return codes


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> Path:
    """`1` and `2`: whole runs. `FROM-TO`: stopped after 3 steps by FROM processes, resumed by TO of them or so."""
    root = tmp_path_factory.mktemp("runs")

    def out(name: str) -> list[str]:
        return [*words, "--out", str(root / name)]

    assert main(out("1")) == 0
    assert stop_after(3, 0, out("1-1")) == EXIT_STOPPED
    two = launch(train_whole_and_half, 2, [free_port(), free_port()], out("2"), out("2-2"))
    assert two == [[0, EXIT_STOPPED]] * 2
    for number, other in (("1", "2"), ("2", "1")):
        half = root / f"{number}-{number}"
        assert checkpoints(half) == ["step_00000003"] and [row["step"] for row in rows(half)] == [1, 2, 3]
        shutil.copytree(half, root / f"{number}-{other}")
        for layout in LAYOUTS if number == "1" else ():
            shutil.copytree(half, root / f"1-{layout}")
    for name in ("1-1", "2-1"):
        assert main(out(name)) == 0
    resumed = [out("1-2"), out("2-2"), *([*out(f"1-{name}"), *words] for name, words in LAYOUTS.items())]
    two = launch(train_each, 2, [free_port() for _ in resumed], resumed)
    assert two == [[0] * len(resumed)] * 2
    return root


@pytest.mark.parametrize("name", ["1-1", "2-2"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit_on_the_same_layout(runs: Path, name: str) -> None:
    assert exact(runs / name) == exact(runs / name[0]) and len(rows(runs / name)) == STEPS
    [ours], [theirs] = rows(runs / name, "eval"), rows(runs / name[0], "eval")
    assert ours == theirs


@pytest.mark.parametrize("name", ["1-2", "2-1", *(f"1-{layout}" for layout in LAYOUTS)])
def test_a_run_goes_on_with_equal_loss_on_another_layout(runs: Path, name: str) -> None:
    for resumed, whole in zip(rows(runs / name), rows(runs / name[0]), strict=True):
        assert [resumed[key] for key in EXACT[:4]] == [whole[key] for key in EXACT[:4]]
        assert abs(resumed["loss"] - whole["loss"]) < 1e-5
    assert exact(runs / name)[3:] != exact(runs / name[0])[3:], "the other layout did not run"


# ---- signals to real processes


def popen(command: Sequence[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_rows(run: Path, number: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while len(rows(run)) < number:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.02)


def workers_of(launcher: subprocess.Popen[str]) -> list[int]:
    return [
        int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    ]


def check_stopped_and_resume(run: Path, command: list[str]) -> None:
    """One checkpoint, of the last row; the run goes on from it, and equals one that was never stopped."""
    done = rows(run)[-1]["step"]
    assert checkpoints(run) == [f"step_{done:08d}"] and not list(run.rglob("*.tmp"))
    assert main([*command, "--out", str(run)]) == 0
    assert [row["step"] for row in rows(run)] == list(range(1, LONG + 1))
    whole = run.with_name("whole")
    assert main([*command, "--out", str(whole)]) == 0
    for ours, theirs in zip(rows(run), rows(whole), strict=True):
        assert abs(ours["loss"] - theirs["loss"]) < 1e-4


LONG = 150
LONG_RUN = [
    "--steps",
    str(LONG),
    "--log.every",
    "1",
    "--checkpoint.every",
    "1000",
    "--log.print-every",
    "1000",
]


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)], ids=lambda x: x.name
)
def test_a_process_that_is_asked_to_stop_writes_a_checkpoint_and_ends_with_75(
    tmp_path: Path, words: list[str], number: signal.Signals
) -> None:
    command, run = [*words, *LONG_RUN], tmp_path / "run"
    process = popen(["-m", "trainer", *command, "--out", str(run)])
    wait_for_rows(run, 5, process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED == 75, (output, errors)
    done = rows(run)[-1]["step"]
    assert errors.splitlines()[-1].startswith(f"trainer: stopped after step {done} of {LONG} as asked")
    check_stopped_and_resume(run, command)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["launcher", "one worker"])
def test_under_torchrun_all_ranks_stop_after_the_same_step(tmp_path: Path, words: list[str], to: str) -> None:
    command, run = [*words, *LONG_RUN], tmp_path / "run"
    process = popen([*TORCHRUN, "-m", "trainer", *command, "--out", str(run)])
    wait_for_rows(run, 5, process)
    if to == "launcher":
        process.send_signal(signal.SIGTERM)
    else:
        os.kill(workers_of(process)[1], signal.SIGUSR1)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1, (output, errors)  # torchrun's own, whatever its workers end with
    assert errors.count("trainer: stopped after step") == 1
    if to == "one worker":
        assert "exitcode  : 75" in errors
    check_stopped_and_resume(run, command)


@pytest.mark.slow
def test_torchrun_sends_a_signal_on_when_it_is_told_to(tmp_path: Path, words: list[str]) -> None:
    command, run = [*words, *LONG_RUN], tmp_path / "run"
    launcher = [*TORCHRUN, "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    process = popen([*launcher, "-m", "trainer", *command, "--out", str(run)])
    wait_for_rows(run, 5, process)
    process.send_signal(signal.SIGUSR1)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "trainer: stopped after step" in errors, (output, errors)
    check_stopped_and_resume(run, command)


def test_signals_only_set_a_flag_and_are_given_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    for number in SIGNALS:
        with listen() as request:
            assert not request.wanted
            os.kill(os.getpid(), number)
            assert request.wanted
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_stop_that_comes_with_the_last_step_is_a_finished_run(tmp_path: Path, words: list[str]) -> None:
    run = tmp_path / "run"
    assert stop_after(STEPS, 0, [*words, "--out", str(run)]) == 0
    assert len(rows(run, "eval")) == 1 and checkpoints(run)[-1] == "step_00000006"


# ---- kill -9


def kill_until_done(run: Path, start: Callable[[], subprocess.Popen[str]], after_rows: Sequence[int]) -> None:
    """Kill a run when it has so many rows more, again and again; then let it end."""
    for more in after_rows:
        process = start()
        wait_for_rows(run, len(rows(run)) + more, process)
        victims = [process.pid, *workers_of(process)]
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        process.communicate()
    process = start()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


KILLED_STEPS = 60
KILLED = ["--steps", str(KILLED_STEPS), "--log.every", "1", "--checkpoint.every", "1", "--eval.packs", "1"]


@pytest.mark.parametrize(
    ("processes", "after_rows"),
    [
        (1, (1, 6)),
        pytest.param(1, (1, 2, 3, 5, 7, 9, 11), marks=pytest.mark.slow),
        pytest.param(2, (2, 5, 8), marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_at_any_moment_goes_on_and_ends_as_if_nothing_had_been(
    tmp_path: Path, words: list[str], processes: int, after_rows: tuple[int, ...]
) -> None:
    command, run = [*words, *KILLED], tmp_path / "run"

    def start() -> subprocess.Popen[str]:
        launcher = [] if processes == 1 else TORCHRUN
        return popen([*launcher, "-m", "trainer", *command, "--out", str(run)])

    kill_until_done(run, start, after_rows)
    assert [row["step"] for row in rows(run)] == list(range(1, KILLED_STEPS + 1))
    assert checkpoints(run) == [f"step_{step:08d}" for step in (KILLED_STEPS - 1, KILLED_STEPS)]
    whole = tmp_path / "whole"
    assert main([*command, "--out", str(whole)]) == 0
    if processes == 1:
        assert exact(run) == exact(whole)
    for ours, theirs in zip(rows(run), rows(whole), strict=True):
        assert abs(ours["loss"] - theirs["loss"]) < 1e-4
    assert len(rows(run, "eval")) == 1


def test_a_disk_that_is_full_ends_the_run_with_one_line_and_the_checkpoints_it_has(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*words, "--out", str(tmp_path / "run")]
    assert main([*command, "--steps", "3"]) == 0
    capsys.readouterr()

    def fill(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.checkpoint.save", fill)
    assert main([*command, "--steps", "9"]) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert "step_00000006 cannot be written" in error and "No space left" in error
    assert checkpoints(tmp_path / "run") == ["step_00000003"]
    assert len(rows(tmp_path / "run")) < 9
