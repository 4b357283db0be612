"""Serial and Ray run the same functions with the same results, failures and retries."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from preprocess.config import PlanConfig, PreprocessConfig, RayConfig
from preprocess.executor import Executor, SerialExecutor
from preprocess.faults import Limits
from preprocess.job import Job, run_job
from preprocess.ray_job import RayExecutor
from preprocess.verify import verify_dataset
from shared.config import to_toml
from shared.errors import UserError
from shared.files import read_json
from tests.preprocess.inputs import captioned, make_config, mixed_samples, png, write_samples, write_tar


@pytest.fixture(scope="module")
def ray_executor() -> Iterator[Executor]:
    executor = RayExecutor(RayConfig(workers=2, queued_per_worker=1), 2, Limits(seconds=60, memory=1 << 30))
    yield executor
    executor.close()


@pytest.fixture(params=["serial", "ray"])
def executor(request: pytest.FixtureRequest) -> Executor:
    return SerialExecutor(2) if request.param == "serial" else request.getfixturevalue("ray_executor")


def failing(directory: Path, failures: int, error: type[Exception]) -> Callable[[int], int]:
    """A function that fails for its first calls; they are counted in files, across processes."""

    def run(unit: int) -> int:
        calls = len(list(directory.iterdir()))
        (directory / f"{calls}").touch()
        if calls < failures:
            raise error(f"call {calls}")
        return unit * unit

    return run


def test_every_unit_is_run_once_also_when_more_are_waiting_than_may_be_queued(executor: Executor) -> None:
    assert sorted(executor.map(lambda unit: unit * unit, range(20))) == [n * n for n in range(20)]
    assert list(executor.map(lambda unit: unit, [])) == []


def test_a_file_that_cannot_be_read_for_a_moment_is_tried_again(executor: Executor, tmp_path: Path) -> None:
    assert list(executor.map(failing(tmp_path, 2, OSError), [7])) == [49]
    assert len(list(tmp_path.iterdir())) == 3


def test_after_the_last_retry_the_error_is_raised(executor: Executor, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="call 2"):
        list(executor.map(failing(tmp_path, 99, OSError), [7]))
    assert len(list(tmp_path.iterdir())) == 3  # retries = 2


def test_a_mistake_of_the_user_is_raised_as_it_is_and_not_tried_again(
    executor: Executor, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"^call 0$"):
        list(executor.map(failing(tmp_path, 99, UserError), [7]))
    assert len(list(tmp_path.iterdir())) == 1


def make_input(directory: Path) -> PreprocessConfig:
    """Three tars, one with a corrupt picture and a long caption, in several shards and both splits."""
    paths = []
    for number in range(3):
        samples = mixed_samples(25, seed=number, prefix=f"{number}-")
        samples[f"{number}-long"] = (png(20, 20), "word " * 40 + "end")
        if number == 1:
            samples["1-broken"] = (png(20, 20)[:-50], "broken")
        paths.append(write_samples(directory / f"{number}.tar", samples))
    plan = PlanConfig(shard_bytes=8192, validation_fraction=0.2)
    return make_config(directory, *paths, plan=plan)


def files(dataset: Path) -> dict[str, bytes]:
    names = [path.relative_to(dataset) for path in dataset.rglob("*") if path.is_file()]
    return {str(name): (dataset / name).read_bytes() for name in names}


def test_ray_and_serial_write_the_same_bytes(tmp_path: Path, ray_executor: Executor) -> None:
    config = make_input(tmp_path)
    run_job(config)
    ray_config = replace(config, output=str(tmp_path / "ray"))
    job = Job(ray_config)
    job.prepare(job.identity)
    job.scan(ray_executor)
    job.pack(ray_executor)
    job.finish()
    serial, parallel = files(Path(config.output)), files(Path(ray_config.output))
    del serial["config.toml"], parallel["config.toml"], serial[".lock"]  # these name the output
    assert serial == parallel
    assert sum(name.startswith("shards/") for name in serial) > 5
    manifest = read_json(Path(ray_config.output) / "dataset.json")
    assert manifest["account"]["web"]["read"] == 79
    assert manifest["account"]["web"]["rejected"] == {"image_corrupt": 1}
    assert verify_dataset(Path(ray_config.output))[1] == []


def run_command(config: PreprocessConfig, directory: Path) -> subprocess.CompletedProcess[str]:
    """`python -m preprocess run` on a config."""
    (directory / "config.toml").write_text(to_toml(config), encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-m", "preprocess", "run", str(directory / "config.toml")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def test_a_bad_tar_found_by_a_ray_worker_ends_the_command_with_one_line(tmp_path: Path) -> None:
    good = write_tar(tmp_path / "a.tar", captioned("a", png(8, 8), "x"))
    bad = tmp_path / "b.tar"
    bad.write_bytes(b"not a tar" * 100)
    config = replace(make_config(tmp_path, good, bad), executor="ray", ray=RayConfig(workers=1))
    done = run_command(config, tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"preprocess: source 'web': {bad}: not a readable tar")


def test_few_units_are_scheduled_ahead_of_the_running_ones(ray_executor: Executor) -> None:
    pulled: list[int] = []

    class Units(list[int]):
        def __iter__(self) -> Iterator[int]:
            for unit in super().__iter__():
                pulled.append(unit)
                yield unit

    results = ray_executor.map(lambda unit: unit, Units(range(100)))
    next(results)
    # 2 workers, each with one unit running and one queued.
    assert len(pulled) == 4
    assert isinstance(results, Generator)
    results.close()


def die(unit: str) -> None:
    os._exit(1)


def test_a_worker_that_keeps_dying_is_one_line_that_names_its_unit(
    ray_executor: Executor, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        UserError, match=r"^a\.tar: its worker died 2 times \(the process ended with exit code 1\)"
    ):
        list(ray_executor.map(die, ["a.tar"]))
    time.sleep(1.5)  # Ray's own word on it would come within a second
    assert capfd.readouterr() == ("", "")


def test_work_that_no_machine_has_memory_for_is_refused_and_does_not_wait_for_ever(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", captioned("a", png(8, 8), "x"))
    config = make_config(tmp_path, path, executor="ray", ray=RayConfig(workers=1, worker_memory=1 << 50))
    done = run_command(config, tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"preprocess: ray.worker_memory is {1 << 50} bytes, the largest node has ")
