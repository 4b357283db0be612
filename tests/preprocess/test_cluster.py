"""A running Ray cluster of three nodes: nodes go, code travels, paths keep their meaning, little crosses it."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from preprocess import ray_job
from preprocess.config import PlanConfig, RayConfig
from preprocess.executor import SerialExecutor
from preprocess.faults import Limits
from preprocess.job import open_job, run_job
from preprocess.ray_job import RayExecutor
from shared.config import to_toml
from shared.errors import UserError
from tests.preprocess.inputs import encode, make_config, mixed_samples, noise, write_samples

ROOT = Path(__file__).resolve().parents[2]
LIMITS = Limits(seconds=60, memory=1 << 30)
# Two cores, and memory for one worker of 1.5 GB.
NODE = {"num_cpus": 2, "memory": 2_000_000_000, "object_store_memory": 80 << 20}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes whose processes run in an empty directory."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    try:
        cluster = Cluster(initialize_head=True, head_node_args=NODE)
        for _ in range(2):
            cluster.add_node(**NODE)
    finally:
        os.chdir(before)
    yield cluster
    cluster.shutdown()


def connect(cluster: Cluster, **settings: Any) -> RayExecutor:
    return RayExecutor(RayConfig(address=cluster.address, **settings), retries=0, limits=LIMITS)


def workers_of(cluster: Cluster) -> Any:
    """The node of the cluster that was added last."""
    return list(cluster.worker_nodes)[-1]


def test_code_and_variables_travel_and_no_more_workers_run_than_memory_allows(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORWARDED", "as it was")
    # Ray tells workers the driver's directory, which on other machines leads nowhere.
    monkeypatch.chdir(tmp_path)

    def look(unit: int) -> tuple[str, str, str]:
        import preprocess

        node = os.getppid()  # its raylet
        mine = tmp_path / f"{node}.{os.getpid()}"
        mine.touch()
        time.sleep(0.3)
        others = [path for path in tmp_path.glob(f"{node}.*") if path != mine]
        mine.unlink()
        assert not others, "two workers on a node that has memory for one"
        return preprocess.__file__, os.environ["FORWARDED"], os.getcwd()

    executor = connect(cluster, forward_env=("FORWARDED",))
    try:
        seen = set(executor.map(look, range(9)))
    finally:
        executor.close()
    for file, variable, directory in seen:
        assert "py_modules_files" in file and not file.startswith(str(ROOT))
        assert variable == "as it was"
        assert directory != os.getcwd()


def test_a_removed_node_costs_no_try_and_its_units_are_run_elsewhere(
    cluster: Cluster, tmp_path: Path
) -> None:
    node = workers_of(cluster)
    executor = connect(cluster)
    (tmp_path / "hold").touch()

    def work(unit: int) -> int:
        (tmp_path / f"{unit}.{len(list(tmp_path.glob(f'{unit}.*')))}").write_text(str(os.getpid()))
        while (tmp_path / "hold").exists():
            time.sleep(0.05)
        return unit

    def remove() -> None:
        while len(list(tmp_path.glob("*.0"))) < 3:  # one on every node
            time.sleep(0.05)
        cluster.remove_node(node, allow_graceful=False)
        pids = [int(path.read_text()) for path in tmp_path.glob("*.0")]
        while all(Path(f"/proc/{pid}").exists() for pid in pids):
            time.sleep(0.05)
        (tmp_path / "hold").unlink()

    threading.Thread(target=remove).start()
    try:
        assert sorted(executor.map(work, range(6))) == list(range(6))  # with retries = 0
    finally:
        executor.close()
        cluster.add_node(**NODE)
    assert len(list(tmp_path.glob("*.1"))) == 1


def test_a_job_whose_node_is_removed_half_way_writes_the_bytes_of_one_process(
    cluster: Cluster, tmp_path: Path
) -> None:
    large = {f"large-{n}": (encode(noise(n, 900, 900), compress_level=1), "noise") for n in range(24)}
    paths = [
        write_samples(tmp_path / f"{n}.tar", {**mixed_samples(15, n, f"{n}-"), **(large if n else {})})
        for n in range(2)
    ]
    config = make_config(tmp_path, *paths, plan=PlanConfig(shard_bytes=4096))
    run_job(config)
    node, seen = workers_of(cluster), []
    remote = replace(
        config,
        output=str(tmp_path / "cluster"),
        executor="ray",
        ray=RayConfig(address=cluster.address),
        retries=0,
    )

    def remove() -> None:
        while len(list((tmp_path / "cluster/shards").glob("*.parquet"))) < 3:
            time.sleep(0.005)
        cluster.remove_node(node, allow_graceful=False)
        seen.append(len(list((tmp_path / "cluster/shards").glob("*.parquet"))))

    threading.Thread(target=remove).start()
    try:
        run_job(remote)
    finally:
        cluster.add_node(**NODE)
    assert shards(tmp_path / "cluster") == shards(tmp_path / "out")
    assert 3 <= seen[0] < len(shards(tmp_path / "out"))


def shards(output: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in (output / "shards").iterdir()}
    return {**found, "dataset.json": (output / "dataset.json").read_bytes()}


@pytest.mark.slow
def test_relative_paths_mean_the_directory_of_the_command_and_only_the_result_is_printed(
    cluster: Cluster, tmp_path: Path
) -> None:
    write_samples(tmp_path / "raw" / "a.tar", mixed_samples(12))
    config = make_config(tmp_path, tmp_path / "raw" / "a.tar")
    (source,) = config.sources.values()
    config = replace(
        config, output="out", tokenizer="tokenizer", sources={"web": replace(source, paths=("raw/*.tar",))}
    )
    (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")

    def run(*words: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "preprocess", "run", "config.toml", "--json", *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": cluster.address}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        return json.loads(done.stdout)

    assert run()["account"]["web"]["packed"] == 12
    run("--output", "elsewhere", "--executor", "ray", "--ray.address", "auto")
    assert shards(tmp_path / "elsewhere") == shards(tmp_path / "out")


def test_a_node_with_other_libraries_is_refused(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_job, "_libraries", lambda: {**ray_job.made_by(), "pillow": "1.0"})
    executor = connect(cluster)
    try:
        with pytest.raises(UserError, match=r"^ray: node .* has pillow .*, this one 1\.0; the bytes"):
            list(executor.map(abs, [1]))
    finally:
        executor.close()


def test_a_module_that_a_node_lacks_is_one_line_that_names_it(cluster: Cluster) -> None:
    def work(unit: int) -> None:
        import no_such_library  # type: ignore[import-not-found]  # noqa: F401

    executor = connect(cluster)
    try:
        with pytest.raises(UserError, match=r"a node cannot import .*no_such_library.*install parquetry"):
            list(executor.map(work, [1]))
    finally:
        executor.close()


def test_a_variable_that_is_not_set_cannot_be_forwarded() -> None:
    with pytest.raises(UserError, match=r"^ray\.forward_env: NO_SUCH_VARIABLE is not set here"):
        RayExecutor(RayConfig(address="127.0.0.1:1", forward_env=("NO_SUCH_VARIABLE",)), 0, LIMITS)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nobody_listens_is_one_line_after_some_seconds(
    monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setattr(ray_job, "CONNECT_SECONDS", 0.1)
    with pytest.raises(UserError, match=rf"^ray: no cluster at {scheme}127.0.0.1:1 \(Connection refused\)"):
        RayExecutor(RayConfig(address=f"{scheme}127.0.0.1:1"), 0, LIMITS)


def test_an_address_of_another_service_is_one_line_after_some_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Quiet(BaseHTTPRequestHandler):
        def log_message(self, format: str, *values: Any) -> None:
            pass

    monkeypatch.setattr(ray_job, "CONNECT_SECONDS", 0.1)
    with HTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match=r"what listens there is no cluster: a head's port is 6379"):
            RayExecutor(RayConfig(address=f"127.0.0.1:{server.server_port}"), 0, LIMITS)
        server.shutdown()


class Measured(SerialExecutor):
    """The bytes of everything that would cross a network."""

    def __init__(self) -> None:
        super().__init__(0)
        self.sizes: dict[str, list[int]] = {}

    def map(self, function: Callable[[Any], Any], units: Sequence[Any]) -> Iterator[Any]:
        sizes = self.sizes.setdefault(function.__name__, [])
        for unit, result in zip(units, super().map(function, units), strict=True):
            sizes += [len(pickle.dumps((function, unit))), len(pickle.dumps(result))]
            yield result


def test_what_crosses_the_network_is_small_however_many_paths_the_config_has(tmp_path: Path) -> None:
    path = write_samples(tmp_path / "a.tar", mixed_samples(20))
    # As long a config as that of 100,000 files.
    names = (str(path),) * 100_000
    config = make_config(tmp_path, path, source={"paths": names})
    executor = Measured()
    with open_job(config) as job:
        job.scan(executor)
        job.plan(executor)
        job.pack(executor)
    assert {"scan_unit", "compare_range", "plan_window", "pack_shard"} <= set(executor.sizes)
    assert max(max(sizes) for sizes in executor.sizes.values()) < 8_000
