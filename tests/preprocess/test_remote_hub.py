"""Inputs from the Hub (hf://): a whole job over tars and tables of a data set there gives the bytes of local ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preprocess.config import PreprocessConfig
from preprocess.job import run_job
from preprocess.sources.captions import CaptionsConfig
from preprocess.sources.webdataset import WebDatasetConfig
from shared.config import to_toml
from tests.preprocess.inputs import encode, make_config, mixed_samples, noise, png, write_samples
from tests.preprocess.stores import Hub, hub_server

ROOT = Path(__file__).parents[2]
HUB = "hf://datasets/x/y"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    directory = tmp_path_factory.mktemp("hub")
    (directory / "tars" / "deep").mkdir(parents=True)
    for name in ("a", "deep/b"):
        write_samples(directory / "tars" / f"{name}.tar", mixed_samples(8, len(name), f"{name[-1]}-"))
    # 4 pictures of some KB before one of 6 MB.
    large = (encode(noise(0, 1400, 1400), compress_level=1), "noise")
    write_samples(directory / "large.tar", {**mixed_samples(4, 7, "c-"), "large": large})
    rows = {"image": [{"bytes": png(20, 30, n)} for n in range(5)], "caption": [f"row {n}" for n in range(5)]}
    pq.write_table(pa.table(rows), directory / "a.parquet")
    with hub_server(directory) as server:
        yield server


def run(hub: Hub, config: PreprocessConfig, directory: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the client reads its settings when it is imported."""
    (directory / "config.toml").write_text(to_toml(config), encoding="utf-8")
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(directory / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, "-m", "preprocess", "run", str(directory / "config.toml"), "--json"]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False
    )


def sources(root: str) -> dict[str, WebDatasetConfig | CaptionsConfig]:
    return {
        "tars": WebDatasetConfig(paths=(f"{root}/tars/**/*.tar",), too_long="split", max_reject_rate=1.0),
        "tables": CaptionsConfig(paths=(f"{root}/*.parquet",)),
    }


def test_tars_and_tables_of_the_hub_are_packed_as_those_of_this_machine(hub: Hub, tmp_path: Path) -> None:
    local = make_config(tmp_path, tmp_path, sources=sources(str(hub.directory)))
    account = run_job(local)["account"]
    remote = replace(local, output=str(tmp_path / "hub"), sources=sources(HUB))
    done = run(hub, remote, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["account"] == account
    assert (account["tars"]["packed"], account["tables"]["packed"]) == (16, 5)
    shards = sorted((tmp_path / "out" / "shards").iterdir())
    assert len(shards) > 1
    for path in [*shards, tmp_path / "out" / "dataset.json"]:
        assert (tmp_path / "hub" / path.relative_to(tmp_path / "out")).read_bytes() == path.read_bytes()


def test_of_a_large_file_no_more_is_asked_for_than_is_read(hub: Hub, tmp_path: Path) -> None:
    config = WebDatasetConfig(paths=(f"{HUB}/large.tar",), max_reject_rate=1.0, too_long="split")
    hub.sent.clear()
    done = run(hub, make_config(tmp_path, tmp_path, sources={"tars": config}), tmp_path)
    assert done.returncode == 0, done.stderr
    size = (hub.directory / "large.tar").stat().st_size
    assert size > 5 << 20
    # Its first 4 MiB to know its compression, all of it for the scan, and its pictures for the pack.
    assert sum(hub.sent) < 2 * size + (5 << 20)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (f"{HUB}/none.tar", "no such file or bucket"),
        ("hf://datasets/x/none/a.tar", "no such file or bucket"),
        (f"{HUB}/none/*.tar", "matches no file"),
        (f"{HUB}/tars", "a directory; name its files"),
    ],
)
def test_what_is_not_there_is_one_line_that_names_it(
    hub: Hub, tmp_path: Path, path: str, message: str
) -> None:
    config = make_config(tmp_path, tmp_path, sources={"web": WebDatasetConfig(paths=(path,))})
    done = run(hub, config, tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert message in line and path.rstrip("*") in line and "source 'web'" in line
