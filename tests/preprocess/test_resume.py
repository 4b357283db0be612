"""SIGKILL at any moment, the same command again: finished work is kept, and the bytes are those of a quiet run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from preprocess.config import PlanConfig, PreprocessConfig
from preprocess.identity import plan_identity, scan_identity
from preprocess.job import run_job
from preprocess.sources import AnySource
from preprocess.sources.webdataset import WebDatasetConfig
from preprocess.verify import verify_dataset
from shared.config import to_toml
from tests.preprocess.inputs import make_config, mixed_samples, write_samples

ROOT = Path(__file__).resolve().parents[2]

# Python runs this at its start: a process that is about to give a file its name kills the job's main process, and
# itself, where it is a worker.
KILLER = """
import os, re, signal
os.environ.setdefault("MAIN_PROCESS", str(os.getpid()))
pattern, replace = re.compile(os.environ["KILL_AT"]), os.replace

def replace_or_kill(source, destination, **options):
    if pattern.search(str(destination)):
        os.kill(int(os.environ["MAIN_PROCESS"]), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, destination, **options)

os.replace = replace_or_kill
"""

# In the order in which the files appear; a resumed job reaches the next.
MOMENTS = {
    "the last index of the scan": r"index/web/000002\.parquet$",
    "the window of the plan": r"plan/train-000000\.parquet$",
    "the end of the plan": r"plan/plan\.json$",
    "the third shard": r"shards/train-000000-002\.parquet$",
    "the result of the fourth shard": r"plan/train-000000-003\.result\.json$",
    "the rejects": r"out/rejects\.parquet$",
    "dataset.json": r"out/dataset\.json$",
}


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> PreprocessConfig:
    """A run that nothing disturbed, in one process."""
    directory = tmp_path_factory.mktemp("quiet")
    paths = [write_samples(directory / f"{n}.tar", mixed_samples(20, n, prefix=f"{n}-")) for n in range(3)]
    config = make_config(directory, *paths, plan=PlanConfig(shard_bytes=8192, duplicates="drop"))
    run_job(config)
    return config


def files(output: str) -> dict[str, bytes]:
    """What is in a data set but the two files that name or hold its place."""
    found = {str(path.relative_to(output)): path for path in Path(output).rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name not in ("config.toml", ".lock")}


def finished(output: str) -> dict[str, int]:
    """Times of all index files and shards that are whole; of a shard, its result says so."""
    found = list(Path(output, "index/web").glob("*.parquet"))
    results = {path.name.removesuffix(".result.json") for path in Path(output, "plan").glob("*.result.json")}
    found += [path for path in Path(output, "shards").glob("*.parquet") if path.stem in results]
    return {str(path): path.stat().st_mtime_ns for path in found}


def run(config: PreprocessConfig, directory: Path, kill_at: str = "") -> int:
    """`python -m preprocess run` as a user starts it; the exit code."""
    (directory / "config.toml").write_text(to_toml(config), encoding="utf-8")
    (directory / "sitecustomize.py").write_text(KILLER, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if kill_at:
        environment |= {"PYTHONPATH": f"{directory}:{ROOT}", "KILL_AT": kill_at}
    command = [sys.executable, "-m", "preprocess", "run", str(directory / "config.toml")]
    return subprocess.run(
        command, env=environment, cwd=directory, capture_output=True, check=False
    ).returncode


def check_kills(
    config: PreprocessConfig, quiet: PreprocessConfig, directory: Path, moments: list[str]
) -> None:
    """Kill the job at each moment in turn, then let it end."""
    for moment in moments:
        before = finished(config.output)
        assert run(config, directory, MOMENTS[moment]) == -signal.SIGKILL, moment
        assert not Path(config.output, "dataset.json").exists()
        assert before.items() <= finished(config.output).items(), f"before {moment}: made again"
    before = finished(config.output)
    assert len(before) > 5
    assert run(config, directory) == 0
    assert before.items() <= finished(config.output).items()
    assert files(config.output) == files(quiet.output)
    assert verify_dataset(Path(config.output))[1] == []


def test_a_job_killed_in_pack_and_at_its_end_goes_on_to_the_same_bytes(
    quiet: PreprocessConfig, tmp_path: Path
) -> None:
    config = replace(quiet, output=str(tmp_path / "out"))
    check_kills(config, quiet, tmp_path, ["the third shard", "dataset.json"])


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["serial", "ray"])
def test_a_job_killed_at_every_pass_goes_on_to_the_same_bytes(
    quiet: PreprocessConfig, tmp_path: Path, executor: Literal["serial", "ray"]
) -> None:
    config = replace(
        quiet, output=str(tmp_path / "out"), executor=executor, ray=replace(quiet.ray, workers=2)
    )
    check_kills(config, quiet, tmp_path, list(MOMENTS))


# A driver whose first unit kills its worker, so that it goes on in a child of the next one, and never ends there.
DRIVER = """
import os, sys, time
from pathlib import Path
from preprocess.config import RayConfig
from preprocess.faults import Limits
from preprocess.ray_job import RayExecutor
import unit

executor = RayExecutor(RayConfig(workers=2), 2, Limits(60, 1 << 30))
list(executor.map(unit.work, ["lethal", "endless"]))
"""
UNIT = """
import os, time
from pathlib import Path

def work(name):
    here = Path(os.environ["PIDS"])
    calls = len(list(here.glob(f"{name}-*")))
    (here / f"{name}-{calls}").write_text(f"{os.getpid()} {os.getppid()}")
    if name == "lethal" and not calls:
        os._exit(1)
    time.sleep(120)
"""


def wait_for(condition: Callable[[], Any], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(met)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


# A worker whose unit runs in a child.
WORKER = """
import unit
from preprocess.faults import Limits, supervise

supervise(unit.work, "endless", Limits(60, 1 << 30))
"""


@pytest.mark.parametrize(
    ("script", "units"),
    [
        pytest.param(DRIVER, ("lethal-1", "endless-0"), id="driver"),
        pytest.param(WORKER, ("endless-0",), id="worker"),
    ],
)
def test_what_a_killed_process_has_started_goes_with_it(
    tmp_path: Path, script: str, units: tuple[str, ...]
) -> None:
    for name, text in (("script", script), ("unit", UNIT)):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    pids = tmp_path / "pids"
    pids.mkdir()
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "PIDS": str(pids)}
    killed = subprocess.Popen([sys.executable, str(tmp_path / "script.py")], env=environment, cwd=tmp_path)
    try:
        paths = [pids / unit for unit in units]
        assert wait_for(lambda: all(path.exists() and path.read_text() for path in paths), 90)
        started = [int(pid) for path in paths for pid in path.read_text().split()]
        assert all(map(is_alive, started))  # of a driver: child and worker, the other worker and the raylet
    finally:
        killed.kill()
        killed.wait()
    assert wait_for(lambda: not any(map(is_alive, started)), 20), "processes outlive the job"


# What may change without a change of a byte, or does through another setting.
HARMLESS = {"output", "executor", "retries", "on_change", "ray", "tokenizer"}
HARMLESS_LIMITS = {"limits.max_seconds", "limits.max_memory"}
HARMLESS_OF_SOURCES = {"max_reject_rate", "bad_file"}


def other(kind: Any, value: Any) -> Any:
    """Another value of a setting."""
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if choice != value)
    if isinstance(value, bool):
        return not value
    if value == "auto":
        return 64
    if isinstance(value, (int, float)):
        return value + 1 if value != 0.0 or isinstance(value, int) else 0.5
    if isinstance(value, str):
        return "#000000" if value.startswith("#") else f"{value}x"
    if isinstance(value, tuple):
        return (*value, "x")
    if value is None:
        return next(choice for choice in get_args(kind) if choice is not type(None))("x")
    raise AssertionError(f"a value of another kind: {value!r}")


def changes(config: Any) -> Iterator[tuple[str, Any]]:
    """Each setting below a config dataclass with another value, where that alone is a valid config."""
    hints = get_type_hints(type(config))
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            for name, changed in changes(value):
                yield from _valid(config, field.name, changed, f"{field.name}.{name}")
        elif not isinstance(value, dict) and field.name != "format":
            yield from _valid(config, field.name, other(hints[field.name], value), field.name)


def _valid(config: Any, field: str, value: Any, name: str) -> Iterator[tuple[str, Any]]:
    try:
        yield name, replace(config, **{field: value})
    except ValueError:
        return


def identity_of(config: PreprocessConfig) -> dict[str, Any]:
    return plan_identity(config, scan_identity(config, [], "tokenizer"))


def test_every_setting_that_may_change_a_byte_is_part_of_the_identity(quiet: PreprocessConfig) -> None:
    before = identity_of(quiet)
    same = {name for name, changed in changes(quiet) if identity_of(changed) == before}
    assert HARMLESS_LIMITS < same
    # The settings of a codec count where that codec is used.
    # What a choice is made by, where nothing is chosen.
    unused = {"budget.rows_multiple", "budget.least_vision"}
    left = {name.split(".")[0] for name in same - HARMLESS_LIMITS - unused}
    assert left - {"jpeg_quality", "zstd_level", "memory"} <= HARMLESS
    for codec, setting in (("jpeg", "jpeg_quality"), ("zstd", "zstd_level")):
        config = replace(quiet, codec=codec)
        assert setting not in {
            name for name, new in changes(config) if identity_of(new) == identity_of(config)
        }
    # The GPU counts where S is chosen by it.
    memory = replace(quiet.memory, gpu_bytes=1 << 30)
    config = replace(quiet, budget=replace(quiet.budget, S="auto", N="auto"), memory=memory)
    same = {name for name, new in changes(config) if identity_of(new) == identity_of(config)}
    assert not any(name.startswith(("memory.", "budget.")) for name in same)


@pytest.mark.parametrize("kind", get_args(AnySource), ids=lambda kind: kind.__name__)
def test_every_setting_of_a_source_that_may_change_a_byte_is_part_of_the_identity(
    quiet: PreprocessConfig, tmp_path: Path, kind: type[WebDatasetConfig]
) -> None:
    (tmp_path / "x").touch()  # what a setting that names a file is changed to
    config = replace(quiet, tokenizer=str(tmp_path), sources={"web": kind(paths=("a",))})
    before = identity_of(config)
    same = {
        name
        for name, changed in changes(config.sources["web"])
        if identity_of(replace(config, sources={"web": changed})) == before
    }
    assert same <= HARMLESS_OF_SOURCES
