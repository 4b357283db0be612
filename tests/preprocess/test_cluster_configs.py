"""configs/cluster: what Ray and KubeRay read, commands that the command line takes, and slurm.sh at work."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from preprocess.config import PreprocessConfig
from preprocess.verify import verify_dataset
from shared.config import load_config, to_toml
from tests.preprocess.inputs import make_config, mixed_samples, write_samples

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "configs" / "cluster"

# Stands for any number of nodes: runs the command here.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""


def load(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))


def commands(text: str) -> list[list[str]]:
    """Arguments of every `python -m preprocess run` in a text; lines that end in a backslash go on."""
    joined = re.sub(r"\\\n\s*", "", text)
    found = re.findall(r"python -m preprocess run ([^\n\"`]+)", joined)
    return [shlex.split(arguments) for arguments in found]


def check_command(arguments: list[str]) -> None:
    """Its settings exist: they are read on top of those of a shipped config."""
    config = load_config(PreprocessConfig, ROOT / "configs/preprocess/captions.toml", arguments[1:])
    assert config.ray.address


@pytest.mark.parametrize("name", ["kuberay.yaml", "ray-up.yaml", "README.md"])
def test_every_command_is_one_that_the_command_line_takes(name: str) -> None:
    text = (CLUSTER / name).read_text(encoding="utf-8")
    found = commands(load(name)["spec"]["entrypoint"] if name == "kuberay.yaml" else text)
    assert found
    for arguments in found:
        check_command(arguments)


@pytest.mark.parametrize("name", [path.name for path in sorted(CLUSTER.iterdir())])
def test_every_file_that_is_named_exists(name: str) -> None:
    text = (CLUSTER / name).read_text(encoding="utf-8")
    paths = set(re.findall(r"(?:configs|benchmarks)/[\w./-]+\.\w+", text))
    assert paths
    assert [path for path in paths if not (ROOT / path).is_file()] == []


def test_ray_up_has_what_ray_reads() -> None:
    config = prepare_config(load("ray-up.yaml"))
    validate_config(config)
    assert config["provider"]["worker_ips"] == ["WORKER_1", "WORKER_2"]


def test_kuberay_has_the_fields_of_a_ray_job() -> None:
    job = load("kuberay.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    # Of the custom resource, v1.2 and later.
    assert set(job["spec"]) <= {
        *("entrypoint", "shutdownAfterJobFinishes", "backoffLimit", "rayClusterSpec"),
        *("runtimeEnvYAML", "ttlSecondsAfterFinished", "submissionMode"),
    }
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert set(workers) == {
        *("groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template")
    }
    for group in (cluster["headGroupSpec"], workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        volumes = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_slurm_runs_a_job_on_two_nodes_and_leaves_nothing_running(tmp_path: Path) -> None:
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "srun").write_text(SRUN, encoding="utf-8")
    (binaries / "srun").chmod(0o755)
    config = make_config(tmp_path, write_samples(tmp_path / "a.tar", mixed_samples(12)), executor="ray")
    (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    port = free_port()
    environment = {
        **os.environ,
        "PATH": f"{binaries}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURMD_NODENAME": "127.0.0.1",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "1",
        "RAY_PORT": str(port),
    }
    script = [str(CLUSTER / "slurm.sh"), str(tmp_path / "config.toml"), "--seed", "7"]
    done = subprocess.run(
        script, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert verify_dataset(Path(config.output))[1] == []
    assert load_config(PreprocessConfig, Path(config.output) / "config.toml").seed == 7
    with pytest.raises(ConnectionRefusedError), socket.socket() as probe:
        probe.connect(("127.0.0.1", port))
