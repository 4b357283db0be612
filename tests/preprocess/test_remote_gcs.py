"""A whole job from and to a GCS store, and what its client does where it differs from that of S3."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from preprocess.config import PreprocessConfig
from preprocess.download import download_dataset
from preprocess.inputs import expand_paths, file_state, read_range
from preprocess.job import run_job
from preprocess.verify import verify_dataset
from shared import remote
from shared.errors import UserError
from shared.files import existing, list_tree, lock_directory, remove_tree
from shared.remote import as_path
from tests.preprocess.inputs import make_config, mixed_samples, write_samples
from tests.preprocess.stores import BUCKET, gs_server, proxy_to, use_gs

ROOT = f"gs://{BUCKET}"
CONTENT = bytes(range(256)) * 400


@pytest.fixture(scope="module", autouse=True)
def gs() -> Iterator[str]:
    with gs_server() as address:
        yield address


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> PreprocessConfig:
    """A finished job over two tars on this machine."""
    directory = tmp_path_factory.mktemp("local")
    paths = [write_samples(directory / f"{n}.tar", mixed_samples(10, n, f"{n}-")) for n in range(2)]
    config = make_config(directory, *paths)
    run_job(config)
    return config


def stored(name: str, local: PreprocessConfig) -> PreprocessConfig:
    """The same job with inputs and outputs in the store."""
    web = local.sources["web"]
    for path in web.paths:
        remote.write_file(Path(path), f"{ROOT}/{name}/tars/{Path(path).name}")
    sources = {"web": replace(web, paths=(f"{ROOT}/{name}/tars/*.tar",))}
    return replace(local, output=f"{ROOT}/{name}/out", sources=sources)


def files(output: Path) -> dict[str, bytes]:
    return {str(p.relative_to(output)): p.read_bytes() for p in output.rglob("*") if p.is_file()}


def assert_same_dataset(config: PreprocessConfig, local: PreprocessConfig) -> None:
    expected = files(Path(local.output))
    expected.pop(".lock")  # it stays on this machine, and goes in a store
    assert set(list_tree(as_path(config.output))) == expected.keys()
    same = [name for name in expected if name.startswith(("shards/", "report/", "tokenizer/", "rejects"))]
    assert len(same) > 6
    for name in [*same, "dataset.json"]:
        assert remote.read_bytes(f"{config.output}/{name}") == expected[name], name


def test_a_job_in_a_store_writes_the_bytes_of_a_job_on_this_machine(
    local: PreprocessConfig, tmp_path: Path
) -> None:
    config = stored("whole", local)
    run_job(config)
    assert_same_dataset(config, local)
    states = remote.list_below(config.output)
    run_job(config)  # finished: nothing to do
    assert remote.list_below(config.output) == states
    assert verify_dataset(as_path(config.output))[1] == []
    download_dataset(as_path(config.output), tmp_path / "copy")
    found, expected = files(tmp_path / "copy"), files(Path(local.output))
    assert [name for name in found if name.startswith("shards/")]
    assert all(found[name] == expected[name] for name in found if name.startswith(("shards/", "dataset")))


def test_a_job_through_broken_connections_comes_to_its_end(
    gs: str, local: PreprocessConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stored("broken", local)
    with proxy_to(gs) as proxy, monkeypatch.context() as patch:
        use_gs(patch, proxy.address)
        proxy.budget = proxy.refill = 150_000
        run_job(config)
        assert proxy.broken > 2
    use_gs(monkeypatch, gs)
    assert_same_dataset(config, local)


def test_a_range_is_its_bytes_and_an_object_that_shrank_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"{ROOT}/range"
    remote.write_bytes(uri, CONTENT)
    monkeypatch.setattr(remote, "PART_BYTES", 30_000)
    assert read_range(uri, 1, len(CONTENT) - 1) == CONTENT[1:]
    for offset in (len(CONTENT) - 10, len(CONTENT) + 5):
        with pytest.raises(UserError, match=r"bucket/range is shorter than at the scan"):
            read_range(uri, offset, 11)


def test_a_state_changes_when_the_object_is_written_again() -> None:
    uri = f"{ROOT}/state"
    remote.write_bytes(uri, b"one")
    before = file_state(uri)
    remote.write_bytes(uri, b"two")
    assert before[0] == file_state(uri)[0] == 3 and before != file_state(uri)


def test_what_another_process_writes_and_removes_is_seen(gs: str) -> None:
    directory = as_path(f"{ROOT}/listed")
    remote.write_bytes(f"{directory}/a", b"1")
    assert existing([directory / "a", directory / "b"]) == {directory / "a"}
    assert remote.find(f"{directory}/*") == [f"{directory}/a"]
    code = f"from shared import remote; remote.write_bytes('{directory}/b', b'2'); remote.remove('{directory}/a')"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
    assert existing([directory / "a", directory / "b"]) == {directory / "b"}
    assert remote.find(f"{directory}/*") == [f"{directory}/b"]


def test_an_output_is_held_by_one_job_and_left_clean() -> None:
    directory = as_path(f"{ROOT}/held")
    with lock_directory(directory, "testing"):
        with pytest.raises(UserError, match=r"another process is testing there \(process \d+ on"):
            with lock_directory(directory, "testing"):
                pass
    assert list_tree(directory) == []


def test_a_tree_is_removed_and_what_lies_beside_it_stays() -> None:
    for name in ("tree/a", "tree/deep/b", "tree-beside"):
        remote.write_bytes(f"{ROOT}/{name}", b"x")
    remove_tree(as_path(f"{ROOT}/tree"))
    assert remote.list_below(f"{ROOT}/tree") == {}
    assert remote.size_of(f"{ROOT}/tree-beside") == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (f"{ROOT}/none.tar", "no such file or bucket"),
        ("gs://no-such-bucket/a.tar", "no such file or bucket"),
        (f"{ROOT}/none/*.tar", "matches no file"),
        (f"{ROOT}/folder", "a directory; name its files"),
    ],
)
def test_what_is_not_there_is_one_line_that_names_it(path: str, message: str) -> None:
    remote.write_bytes(f"{ROOT}/folder/a", b"x")
    with pytest.raises(UserError, match=message) as caught:
        expand_paths("web", (path,))
    assert path.rstrip("*") in str(caught.value) and "'web'" in str(caught.value)
