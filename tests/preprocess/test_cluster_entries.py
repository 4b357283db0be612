"""The ways into a running cluster from outside of it: `ray job submit`, and --ray.address ray://HOST:PORT.

A head of its own, started as a person starts one, on ports of its own and behind a token.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from preprocess.config import PreprocessConfig
from preprocess.job import run_job
from shared.config import to_toml
from tests.preprocess.inputs import make_config, mixed_samples, write_samples, write_tar

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
BINARIES = Path(sys.executable).parent


@dataclass(frozen=True)
class Head:
    """Addresses of its job server and of its server for clients; what has to be set to be let in."""

    jobs: str
    client: str
    environment: Mapping[str, str]

    def submit(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`ray job submit`, which ends when the job ends; its output holds that of the job."""
        command = [str(BINARIES / "ray"), "job", "submit", "--address", self.jobs, *words]
        return self._run(command, ROOT)

    def run(self, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """`python -m preprocess run` in a process of this machine that is no node of the cluster."""
        return self._run([sys.executable, "-m", "preprocess", "run", *words], cwd)

    def _run(self, command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200, check=False
        )


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    port, client, jobs, agent = free_ports(4)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
        "PATH": f"{BINARIES}:{os.environ['PATH']}",  # the `python` of a submitted command
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    # A short name: sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as directory:
        options = {
            "node-ip-address": "127.0.0.1",
            "port": port,
            "min-worker-port": 0,
            "max-worker-port": 0,
            "num-cpus": 2,
            "memory": 4_000_000_000,
            "object-store-memory": 80 << 20,
            "ray-client-server-port": client,
            "dashboard-host": "127.0.0.1",
            "dashboard-port": jobs,
            "dashboard-agent-listen-port": agent,
            "temp-dir": directory,
        }
        command = [str(BINARIES / "ray"), "start", "--head", "--block", "--include-dashboard=true"]
        with open(f"{directory}/head.log", "w+", encoding="utf-8") as log:
            process = subprocess.Popen(
                [*command, *(f"--{name}={value}" for name, value in options.items())],
                cwd=directory,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            try:
                for server in (client, jobs):
                    await_server(server, process, Path(log.name))
                yield Head(f"http://127.0.0.1:{jobs}", f"ray://127.0.0.1:{client}", environment)
            finally:
                process.terminate()  # it ends the processes that it started
                process.wait(60)


def await_server(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 90
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(encoding="utf-8")
            time.sleep(0.1)


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> PreprocessConfig:
    """A job over two tars, finished in this process."""
    directory = tmp_path_factory.mktemp("serial")
    paths = [write_samples(directory / "raw" / f"{n}.tar", mixed_samples(15, n, f"{n}-")) for n in range(2)]
    config = make_config(directory, *paths)
    run_job(config)
    return config


def write_config(config: PreprocessConfig, directory: Path) -> Path:
    path = directory / "config.toml"
    remote = replace(config, output=str(directory / "out"), executor="ray")
    path.write_text(to_toml(remote), encoding="utf-8")
    return path


def dataset(output: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in (output / "shards").iterdir()}
    return {**found, "dataset.json": (output / "dataset.json").read_bytes()}


def test_a_submitted_job_with_the_code_of_a_checkout_writes_the_bytes_of_one_process(
    head: Head, serial: PreprocessConfig, tmp_path: Path
) -> None:
    config = write_config(serial, tmp_path)
    words = ["--", "python", "-m", "preprocess", "run", str(config), "--ray.address", "auto"]
    done = head.submit("--working-dir", ".", *words)
    assert done.returncode == 0, done.stdout
    assert "succeeded" in done.stdout
    found = dataset(tmp_path / "out")
    assert len(found) > 3
    assert found == dataset(Path(serial.output))


def test_a_submission_that_sends_the_packages_itself_is_one_line_that_says_how_to_submit(
    head: Head, serial: PreprocessConfig, tmp_path: Path
) -> None:
    config = write_config(serial, tmp_path)
    words = ["--", "python", "-m", "preprocess", "run", str(config), "--ray.address", "auto"]
    done = head.submit("--runtime-env-json", json.dumps({"py_modules": ["preprocess", "shared"]}), *words)
    assert done.returncode != 0
    (line, *_) = [line for line in done.stdout.splitlines() if line.startswith("preprocess: ")]
    assert line.startswith("preprocess: ray: the job was submitted with py_modules, excludes or variables")
    assert "--working-dir" in line
    assert not (tmp_path / "out" / "shards").exists()


def test_a_job_whose_process_is_no_node_writes_the_bytes_of_one_process(
    head: Head, serial: PreprocessConfig, tmp_path: Path
) -> None:
    config = write_config(serial, tmp_path)
    done = head.run(str(config), "--ray.address", head.client, "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["account"]["web"]["packed"] == 30
    assert dataset(tmp_path / "out") == dataset(Path(serial.output))


def test_what_a_worker_says_of_a_bad_file_arrives_as_one_line_through_the_client(
    head: Head, tmp_path: Path
) -> None:
    bad = write_tar(tmp_path / "b.tar", [])
    bad.write_bytes(b"not a tar" * 100)
    config = write_config(make_config(tmp_path, bad), tmp_path)
    done = head.run(str(config), "--ray.address", head.client, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"preprocess: source 'web': {bad}: not a readable tar")
