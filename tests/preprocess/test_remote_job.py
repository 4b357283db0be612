"""A whole job from and to an S3 store: the bytes of the local job, also when it is killed and goes on."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from preprocess.__main__ import main
from preprocess.config import PreprocessConfig
from preprocess.download import download_dataset
from preprocess.job import run_job
from shared import remote, remote_lock
from shared.config import to_toml
from shared.dataset import open_dataset
from shared.errors import UserError
from shared.files import lock_directory, remove_tree
from shared.remote import as_path
from shared.tokens import reopen_tokenizer
from tests.preprocess.inputs import make_config, mixed_samples, write_samples
from tests.preprocess.stores import BUCKET, client, proxy_to, put, s3_server, use_s3
from tests.preprocess.test_tars import PACK

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> PreprocessConfig:
    """A finished job over two plain tars and a packed one, all on this machine."""
    directory = tmp_path_factory.mktemp("local")
    paths = [write_samples(directory / f"{n}.tar", mixed_samples(10, n, f"{n}-")) for n in range(3)]
    paths[2].write_bytes(PACK["zstd"](paths[2].read_bytes()))
    config = make_config(directory, *paths)
    run_job(config)
    return config


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)


def stored(name: str, local: PreprocessConfig) -> PreprocessConfig:
    """The same job with inputs and outputs in the store."""
    web = local.sources["web"]
    for path in web.paths:
        put(f"{name}/tars/{Path(path).name}", Path(path).read_bytes())
    sources = {"web": replace(web, paths=(f"s3://{BUCKET}/{name}/tars/*.tar",))}
    return replace(local, output=f"s3://{BUCKET}/{name}/out", sources=sources)


def names(config: PreprocessConfig) -> list[str]:
    """What lies below an output in the store, relative to it."""
    prefix = config.output.removeprefix(f"s3://{BUCKET}/") + "/"
    pages = client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return [entry["Key"].removeprefix(prefix) for page in pages for entry in page.get("Contents", ())]


def objects(config: PreprocessConfig) -> dict[str, bytes]:
    store, prefix = client(), config.output.removeprefix(f"s3://{BUCKET}/")
    return {
        name: store.get_object(Bucket=BUCKET, Key=f"{prefix}/{name}")["Body"].read() for name in names(config)
    }


def files(config: PreprocessConfig) -> dict[str, bytes]:
    output = Path(config.output)
    return {str(p.relative_to(output)): p.read_bytes() for p in output.rglob("*") if p.is_file()}


def assert_same_dataset(config: PreprocessConfig, local: PreprocessConfig) -> None:
    found, expected = objects(config), files(local)
    expected.pop(".lock")  # it stays on this machine, and goes in a store
    assert found.keys() == expected.keys()
    # The rest names where inputs lie: plans, identities, the config.
    same = [name for name in expected if name.startswith(("shards/", "report/", "tokenizer/", "rejects"))]
    assert len(same) > 6
    for name in [*same, "dataset.json"]:
        assert found[name] == expected[name], name


@pytest.fixture(scope="module")
def whole(s3: str, local: PreprocessConfig) -> PreprocessConfig:
    """The same job, finished in the store."""
    config = stored("whole", local)
    run_job(config)
    return config


def test_a_job_in_a_store_writes_the_bytes_of_a_job_on_this_machine(
    whole: PreprocessConfig, local: PreprocessConfig
) -> None:
    assert_same_dataset(whole, local)


def test_a_finished_job_in_a_store_writes_no_shard_again(whole: PreprocessConfig) -> None:
    prefix = whole.output.removeprefix(f"s3://{BUCKET}/") + "/shards/"
    before = client().list_objects_v2(Bucket=BUCKET, Prefix=prefix)["Contents"]
    run_job(whole)
    assert client().list_objects_v2(Bucket=BUCKET, Prefix=prefix)["Contents"] == before


@pytest.mark.parametrize("command", ["verify", "report", "inspect --pack 1", "inspect --sample 0-0003"])
def test_a_data_set_in_a_store_is_looked_at_as_one_on_this_machine(
    whole: PreprocessConfig, local: PreprocessConfig, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    answers: list[str] = []
    for config in (local, whole):
        name, *options = command.split()
        assert main([name, config.output, *options, "--json"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and len(answers[0]) > 50


def test_verify_finds_what_is_wrong_in_a_store(
    whole: PreprocessConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = [name for name in names(whole) if name.startswith("shards/")]
    key = f"whole/out/{shards[1]}"
    data = client().get_object(Bucket=BUCKET, Key=key)["Body"].read()
    try:
        put(key, data[:-100] + bytes(100))
        assert main(["verify", whole.output]) == 1
        assert f"{shards[1].removeprefix('shards/')}: file checksum" in capsys.readouterr().out
        client().delete_object(Bucket=BUCKET, Key=key)
        assert main(["verify", whole.output]) == 1
        assert f"{shards[1].removeprefix('shards/')}: is missing" in capsys.readouterr().out
    finally:
        put(key, data)


def test_a_downloaded_data_set_is_the_local_one_and_a_download_goes_on_where_it_stopped(
    whole: PreprocessConfig, local: PreprocessConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["download", whole.output, str(tmp_path / "copy"), "--json"]) == 0
    found, expected = files(replace(local, output=str(tmp_path / "copy"))), files(local)
    first = json.loads(capsys.readouterr().out)
    assert {name for name in expected if name.startswith(("shards/", "report/", "tokenizer/"))} < found.keys()
    for name in found.keys() - {"config.toml", ".lock"}:
        assert found[name] == expected[name], name
    shards = sorted((tmp_path / "copy" / "shards").iterdir())
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-1] + b"?")
    (tmp_path / "copy" / "dataset.json").unlink()
    assert main(["download", whole.output, str(tmp_path / "copy"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (first["shards"], first["kept"]) == (len(shards), 0)
    assert (again["shards"], again["kept"]) == (2, len(shards) - 2)
    assert open_dataset(tmp_path / "copy").identity == open_dataset(local.output).identity


def test_a_download_that_stops_leaves_no_manifest_of_the_data_set_it_replaces(
    local: PreprocessConfig, tmp_path: Path
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for copy in (source, target):
        shutil.copytree(local.output, copy)
    manifest = target / "dataset.json"
    damaged = next((source / "shards").iterdir())
    damaged.write_bytes(b"?")
    (target / "shards" / damaged.name).unlink()
    with pytest.raises(UserError, match="has checksum"):
        download_dataset(source, target)
    assert manifest.read_bytes() == (source / "dataset.json").read_bytes()  # of the same one: it stays
    manifest.write_text(manifest.read_text() + " ")
    with pytest.raises(UserError, match="has checksum"):
        download_dataset(source, target)
    assert not manifest.exists()


def test_a_download_leaves_no_template_of_the_data_set_it_replaces(tmp_path: Path) -> None:
    config = make_config(tmp_path, write_samples(tmp_path / "a.tar", mixed_samples(2)))
    template = tmp_path / "tokenizer" / "chat_template.jinja"
    template.write_text("{{ messages }}")
    run_job(config)
    target = tmp_path / "copy"
    download_dataset(Path(config.output), target)
    assert (target / "tokenizer" / template.name).exists()
    template.unlink()
    other = replace(config, output=str(tmp_path / "other"))
    run_job(other)
    download_dataset(Path(other.output), target)
    reopen_tokenizer(target / "tokenizer", open_dataset(target).tokens)  # the one that it was made with


def test_a_download_opens_no_shard_and_so_takes_more_shards_than_files_can_be_open(
    local: PreprocessConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.dataset.allow_open_files", lambda needed: 10)
    with pytest.raises(UserError, match="open files, the limit is 10"):
        open_dataset(local.output)
    assert download_dataset(Path(local.output), tmp_path / "copy")["shards"] > 1


def test_what_trains_says_how_to_copy_a_data_set_that_is_in_a_store(whole: PreprocessConfig) -> None:
    with pytest.raises(UserError, match=r"python -m preprocess download s3://bucket/whole/out DIRECTORY"):
        open_dataset(whole.output)


def test_what_is_no_data_set_is_one_line(s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put("broken-set/dataset.json", b"{}")
    for command in (["verify"], ["inspect"], ["report"], ["download"]):
        for place in ("nothing", "broken-set"):
            more = [str(tmp_path / "x")] if command == ["download"] else []
            assert main([*command, f"s3://{BUCKET}/{place}", *more]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert f"s3://{BUCKET}/{place}" in line


def test_a_job_through_broken_connections_comes_to_its_end(
    s3: str, local: PreprocessConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stored("broken", local)
    with proxy_to(s3) as proxy, monkeypatch.context() as patch:
        use_s3(patch, proxy.address)
        # Every connection breaks off after a while: pictures, plans and shards in the middle.
        proxy.budget = proxy.refill = 150_000
        run_job(config)
        assert proxy.broken > 3
    use_s3(pytest.MonkeyPatch(), s3)
    assert_same_dataset(config, local)


def test_a_job_whose_store_goes_away_is_one_line_and_goes_on_later(
    s3: str,
    local: PreprocessConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = replace(stored("gone", local), retries=0)
    with proxy_to(s3) as proxy, monkeypatch.context() as patch:
        use_s3(patch, proxy.address)
        patch.setattr(remote, "ATTEMPTS", 1)
        patch.setattr("s3fs.S3FileSystem.retries", 1)
        proxy.budget = 250_000
        (tmp_path / "config.toml").write_text(to_toml(config))
        assert main(["run", str(tmp_path / "config.toml")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "s3://bucket/gone/" in line
        assert proxy.broken > 0
    use_s3(pytest.MonkeyPatch(), s3)
    before = objects(config)
    assert "dataset.json" not in before and len(before) > 2
    # The lock could not be taken away: it ends by itself.
    monkeypatch.setattr(remote_lock, "STALE_SECONDS", 0.0)
    run_job(config)
    assert_same_dataset(config, local)


@pytest.mark.slow
def test_a_killed_job_is_taken_over_at_once_on_its_machine(
    s3: str, local: PreprocessConfig, tmp_path: Path
) -> None:
    config = stored("killed", local)
    (tmp_path / "config.toml").write_text(to_toml(config))
    command = [sys.executable, "-m", "preprocess", "run", str(tmp_path / "config.toml")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any(name.startswith("shards/") for name in names(config)) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = objects(config)
    assert ".lock" in before and "dataset.json" not in before
    run_job(config)
    assert_same_dataset(config, local)
    kept = [name for name in before if name.startswith("shards/")]
    assert kept and all(before[name] == objects(config)[name] for name in kept)


def test_an_output_in_a_store_is_held_by_one_job_and_taken_over_when_that_gives_no_sign(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = as_path(f"s3://{BUCKET}/held")
    with lock_directory(directory, "testing"):
        with pytest.raises(UserError, match=r"another process is testing there \(process \d+ on"):
            with lock_directory(directory, "testing"):
                pass
        monkeypatch.setattr(remote_lock, "STALE_SECONDS", 0.0)
        with lock_directory(directory, "testing"):
            pass
    assert client().list_objects_v2(Bucket=BUCKET, Prefix="held/")["KeyCount"] == 0


def test_a_lock_is_renewed_while_it_is_held(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_lock, "RENEW_SECONDS", 0.05)

    def renewed() -> float:
        data = client().get_object(Bucket=BUCKET, Key="renewed/.lock")["Body"].read()
        return json.loads(data)["renewed"]

    with lock_directory(as_path(f"s3://{BUCKET}/renewed"), "testing"):
        before = renewed()
        deadline = time.monotonic() + 10
        while renewed() == before:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            "s3://no-such-bucket/out",
            "s3://no-such-bucket/out/.lock: no such file or bucket; correct the path",
        ),
        ("https://example.org/out", "https://example.org/out: not a place for outputs"),
        ("nowhere://a/out", "nowhere"),
    ],
)
def test_an_output_that_cannot_be_written_to_is_one_line(
    s3: str, local: PreprocessConfig, output: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run_job(replace(local, output=output))


@pytest.mark.slow
def test_another_config_in_the_same_place_is_refused_and_rebuilt_on_demand(
    s3: str, local: PreprocessConfig
) -> None:
    config = stored("changed", local)
    run_job(replace(config, seed=1))
    with pytest.raises(
        UserError, match=r"s3://bucket/changed/out: holds a run with other settings .*seed: 1, now 0"
    ):
        run_job(config)
    run_job(replace(config, on_change="rebuild"))
    assert objects(config)["dataset.json"] == files(local)["dataset.json"]
    remove_tree(as_path(config.output))
    assert objects(config) == {}
