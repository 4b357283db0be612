"""Files that are complete or absent."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import xxhash

from shared.errors import UserError
from shared.files import (
    allow_open_files,
    atomic_path,
    canonical_json,
    file_checksum,
    lock_directory,
    read_json,
    remove_temporaries,
    remove_tree,
    sha256,
    write_json,
)

ROOT = Path(__file__).resolve().parents[2]


def test_a_finished_file_stands_under_its_name_and_no_temporary_is_left(tmp_path: Path) -> None:
    target = tmp_path / "made" / "on" / "the way.txt"
    with atomic_path(target) as temporary:
        assert temporary.parent == target.parent, "a rename across file systems is a copy"
        temporary.write_text("all of it")
        assert not target.exists()
    assert target.read_text() == "all of it"
    assert list(target.parent.iterdir()) == [target]


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="half way"), atomic_path(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise RuntimeError("half way")
    assert list(tmp_path.iterdir()) == []


def test_an_exception_leaves_the_older_file_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert target.read_text() == "old"
    with atomic_path(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"


def test_a_disk_that_is_full_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, atomic_path(tmp_path / "a"):
        os.write(os.open("/dev/full", os.O_WRONLY), b"x")
    assert caught.value.filename == str(tmp_path / "a")


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "file"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_two_processes_write_two_temporaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with atomic_path(tmp_path / "file") as first:
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with atomic_path(tmp_path / "file") as second:
            assert first != second
            first.write_text("first")
            second.write_text("second")
    assert (tmp_path / "file").read_text() == "first", "the last rename wins, whole"


def test_remove_temporaries_takes_what_a_killed_attempt_left_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    kept, left = tmp_path / "shards" / "a.parquet", tmp_path / "shards" / "b.parquet"
    kept.write_text("kept")
    # The name that a killed attempt leaves is the one that atomic_path gives.
    context = atomic_path(left)
    context.__enter__().write_text("half")
    assert len(list(kept.parent.iterdir())) == 2
    remove_temporaries(tmp_path)
    assert list(kept.parent.iterdir()) == [kept]


def test_json_comes_back_as_it_was(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, True], "a": 'é "quoted"\n日本'}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json") == value
    assert "日本" in (tmp_path / "value.json").read_text(encoding="utf-8")


def test_canonical_json_does_not_depend_on_the_order_of_keys() -> None:
    assert canonical_json({"b": 1, "a": [1, 2]}) == canonical_json({"a": [1, 2], "b": 1})
    assert canonical_json({"b": 1, "a": "é"}) == '{"a":"é","b":1}'.encode()


def test_checksums_equal_the_libraries_own_over_the_whole_bytes(tmp_path: Path) -> None:
    data = os.urandom(1 << 20) * 17  # 17 MiB: more than the block that is read at once
    (tmp_path / "file").write_bytes(data)
    assert file_checksum(tmp_path / "file") == xxhash.xxh3_64(data).hexdigest()
    assert sha256(b"ab", b"", b"c") == hashlib.sha256(b"abc").hexdigest()


def test_a_directory_is_held_by_one_process_until_that_ends(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "output"
    program = (
        "import sys; from pathlib import Path; from shared.files import lock_directory\n"
        "with lock_directory(Path(sys.argv[1]), 'testing'):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(directory)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdin is not None and holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=r"another process is testing there; wait for it"):
        with lock_directory(directory, "testing"):
            pass
    holder.kill()
    holder.wait()
    with lock_directory(directory, "testing"), pytest.raises(UserError), lock_directory(directory, "testing"):
        pass


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(UserError, match="cannot be made or written to"),
        lock_directory(tmp_path / "file", "x"),
    ):
        pass


def test_a_directory_that_cannot_be_removed_is_an_error_that_names_it(tmp_path: Path) -> None:
    remove_tree(tmp_path / "none")
    (tmp_path / "there" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with pytest.raises(
        UserError, match=rf"^{tmp_path}/link: cannot be removed .*remove {tmp_path}/link yourself"
    ):
        remove_tree(tmp_path / "link")
    remove_tree(tmp_path / "there")
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("content", [None, "{", "\x00"])
def test_a_missing_or_damaged_json_file_is_an_error_that_says_what_to_do(
    tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"x\.json: .*; make it again"):
        read_json(path, mend="make it again")


def test_a_file_system_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock_directory(tmp_path, "testing"):
        assert "no locks here" in caplog.text


def test_the_limit_of_open_files_is_raised_as_far_as_the_system_lets_it() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        assert allow_open_files(200) is None
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (256, hard)
        assert allow_open_files(300) is None
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300, hard)
        if hard != resource.RLIM_INFINITY:
            assert allow_open_files(hard + 1) == hard
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
