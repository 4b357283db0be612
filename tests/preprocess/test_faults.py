"""Samples that kill, stall or bloat their worker are found, counted as `crashed`, and everything else is packed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from preprocess.config import PlanConfig, RayConfig
from preprocess.executor import Executor, SerialExecutor
from preprocess.faults import NO_ITEM, Limits, begin, limited, supervise
from preprocess.job import open_job
from preprocess.ray_job import RayExecutor
from preprocess.verify import verify_dataset
from shared.errors import UserError
from tests.preprocess.faulty import Unit, add_up
from tests.preprocess.inputs import encode, make_config, mixed_samples, write_samples

LIMITS = Limits(seconds=1.0, memory=700 << 20)


@pytest.mark.parametrize(
    ("how", "detail"),
    [
        ("segfault", "the process ended with SIGSEGV"),
        ("endless", "no result within its time (limits.max_seconds = 1)"),
        ("bloat", f"more than {700 << 20} bytes of memory"),
        ("exit", "the process ended with exit code 3"),
    ],
)
def test_the_sample_that_ends_its_process_is_left_out_and_the_rest_is_done(
    tmp_path: Path, how: str, detail: str
) -> None:
    unit = Unit([1, 10, 100, 1000], {2: how}, tmp_path)
    limits = LIMITS if how == "endless" else replace(LIMITS, seconds=60)
    assert supervise(add_up, unit, limits) == (1011, {2: detail})
    assert len(list(tmp_path.iterdir())) == 3  # two deaths, then the rest


def test_several_such_samples_are_found_one_after_another(tmp_path: Path) -> None:
    unit = Unit([1, 10, 100], {0: "segfault", 2: "exit"}, tmp_path)
    total, crashed = supervise(add_up, unit, LIMITS)
    assert total == 10 and set(crashed) == {0, 2}


def test_a_unit_that_dies_at_another_sample_each_time_is_an_error_that_asks_for_memory(
    tmp_path: Path,
) -> None:
    unit = Unit([1] * 20, dict.fromkeys(range(20), "scattered"), tmp_path)
    with pytest.raises(UserError, match=r"died 7 times, at 7 places .*exit code 3.*limits\.max_memory"):
        supervise(add_up, unit, LIMITS)


def test_a_process_that_is_killed_once_by_chance_costs_no_sample(tmp_path: Path) -> None:
    assert supervise(add_up, Unit([1, 10], {1: "once"}, tmp_path), LIMITS) == (11, {})


def test_a_death_outside_of_any_sample_is_an_error_that_names_the_unit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"its worker died 2 times \(the process ended with exit code 3\)"):
        supervise(add_up, Unit([1], {NO_ITEM: "exit"}, tmp_path), LIMITS)


def test_an_error_of_the_function_is_raised_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^a mistake$"):
        supervise(add_up, Unit([1], {0: "user"}, tmp_path), LIMITS)


def test_limits_end_with_their_block() -> None:
    with limited(Limits(seconds=0.2, memory=1 << 40)):
        begin(0)
    with limited(Limits(seconds=100, memory=1)):
        pass  # no time to look
    time.sleep(0.3)  # neither alarm nor watch is left


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    executor = RayExecutor(RayConfig(workers=2), 2, LIMITS)
    yield executor
    executor.close()


def test_a_ray_worker_that_dies_of_a_sample_goes_on_without_it(executor: Executor, tmp_path: Path) -> None:
    units = [Unit([1, 2], {1: "segfault"}, tmp_path / "a"), Unit([4], {}, tmp_path / "b")]
    for unit in units:
        unit.calls.mkdir()
    done = sorted(total for total, _ in executor.map(add_up, units))
    assert done == [1, 4]


@pytest.mark.parametrize(
    ("limits", "detail"),
    [
        pytest.param(
            Limits(0.25, 1 << 40), "no result within its time (limits.max_seconds = 0.25)", id="time"
        ),
        pytest.param(
            Limits(60, 420 << 20),
            f"more than {420 << 20} bytes of memory",
            id="memory",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_picture_that_ends_its_worker_is_rejected_as_crashed_and_the_job_completes(
    tmp_path: Path, limits: Limits, detail: str
) -> None:
    # 49 megapixels of noise: a second of work, and 150 MB a copy.
    noisy = Image.effect_noise((700, 700), 90).resize((7000, 7000)).convert("RGB")
    samples = {**mixed_samples(20), "heavy": (encode(noisy, "PNG", compress_level=1), "too much")}
    path = write_samples(tmp_path / "a.tar", {**samples, **mixed_samples(20, seed=1, prefix="x")})

    class Supervised(SerialExecutor):
        def map(self, function: Any, units: Any) -> Iterator[Any]:
            return (supervise(function, unit, limits) for unit in units)

    with open_job(make_config(tmp_path, path, plan=PlanConfig())) as job:
        job.scan(Supervised(0))
        job.plan(Supervised(0))
        job.pack(Supervised(0))
        account = job.finish()["account"]["web"]
    assert (account["read"], account["packed"], account["rejected"]) == (41, 40, {"crashed": 1})
    (reject,) = pq.read_table(job.output / "rejects.parquet").to_pylist()
    assert (reject["key"], reject["reason"], reject["detail"]) == ("heavy", "crashed", detail)
    assert verify_dataset(job.output)[1] == []
