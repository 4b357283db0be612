"""Files in a store: complete or absent, found, listed and removed as on this machine."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3fs import S3FileSystem

from shared.errors import UserError
from shared.files import (
    atomic_path,
    existing,
    exists,
    file_checksum,
    file_size,
    list_files,
    list_tree,
    read_json,
    read_part,
    remove,
    remove_temporaries,
    remove_tree,
    write_json,
)
from shared.remote import as_path, is_remote, shown
from shared.tables import open_table, read_table
from tests.preprocess.stores import BUCKET, client, put, s3_server, without_gs


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture(params=["here", "store"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A place for files, on this machine or in a store."""
    if request.param == "here":
        return tmp_path
    request.getfixturevalue("s3")
    return as_path(f"s3://{BUCKET}/{tmp_path.name}")


def write(path: Path, text: str) -> Path:
    with atomic_path(path) as temporary:
        temporary.write_text(text)
    return path


def test_a_file_is_there_when_all_of_it_is(directory: Path) -> None:
    path = directory / "deep" / "file.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("all of it")
        assert not exists(path)
    assert file_size(path) == 9 and read_part(path, 4, 6) == b"of" and read_part(path, 7, 99) == b"it"


def test_an_exception_leaves_the_older_file(directory: Path) -> None:
    path = write(directory / "file", "old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("newer")
        raise RuntimeError
    assert read_part(path, 0, 99) == b"old" and list_tree(directory) == ["file"]


def test_a_block_that_writes_nothing_is_an_error(directory: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(directory / "file"):
        pass
    assert list_tree(directory) == []


def test_json_comes_back_and_a_missing_or_damaged_one_is_one_line(directory: Path) -> None:
    write_json(directory / "a.json", {"é": [1, None]})
    assert read_json(directory / "a.json") == {"é": [1, None]}
    write(directory / "b.json", "{")
    for name, message in (("b.json", "not valid JSON"), ("c.json", "cannot be read")):
        with pytest.raises(UserError, match=rf"{name}: {message}.*; mend it"):
            read_json(directory / name, mend="mend it")


def test_files_are_found_listed_and_removed(directory: Path) -> None:
    for name in ("a.x", "b.x", "b.y", "deep/c.x"):
        write(directory / name, name)
    wanted = [directory / "a.x", directory / "none", directory / "deep" / "c.x"]
    assert existing(wanted) == {wanted[0], wanted[2]}
    assert list_files(directory, "*.x") == [directory / "a.x", directory / "b.x"]
    assert list_files(directory / "none", "*") == []
    assert list_tree(directory) == ["a.x", "b.x", "b.y", "deep/c.x"]
    assert list_tree(directory / "none") == []
    remove(directory / "a.x")
    remove(directory / "a.x")
    remove_temporaries(directory)
    remove_tree(directory / "deep")
    assert list_tree(directory) == ["b.x", "b.y"]
    remove_tree(directory)
    assert file_size(directory / "b.x") is None


def test_a_table_is_read_whole_and_in_parts_and_damage_is_one_line(directory: Path) -> None:
    table = pa.table({"n": list(range(1000))})
    with atomic_path(directory / "t.parquet") as temporary:
        pq.write_table(table, temporary, row_group_size=300, compression="none", write_page_checksum=True)
    path = directory / "t.parquet"
    assert read_table(path, "mend it").equals(table)
    with open_table(path, "mend it") as file:
        assert file.num_row_groups == 4 and file.read_row_group(1)["n"][0].as_py() == 300
    data = read_part(path, 0, 1 << 20)
    with atomic_path(directory / "bad.parquet") as temporary:
        temporary.write_bytes(data[:200] + bytes(64) + data[264:])
    for name, message in (("bad.parquet", "damaged"), ("none.parquet", "no such file")):
        with pytest.raises(UserError, match=rf"{name}: {message}.*; mend it"):
            read_table(directory / name, "mend it")


def test_checksums_are_those_of_the_bytes(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "same").write_text("content")
    assert file_checksum(write(directory / "a", "content")) == file_checksum(tmp_path / "same")


def test_a_path_in_a_store_keeps_its_arithmetic_through_a_pickle(s3: str) -> None:
    path = pickle.loads(pickle.dumps(as_path(f"s3://{BUCKET}/a/") / "b.parquet"))
    assert str(path.with_suffix(".tokens")) == f"s3://{BUCKET}/a/b.tokens"
    assert str(path.absolute()) == str(path) and path.name == "b.parquet"
    put("a/b.parquet", b"x")
    assert existing([path]) == {path}


def test_the_second_names_of_protocols_find_what_the_first_ones_do(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("second/a", b"x")
    directory = as_path(f"s3a://{BUCKET}/second/")
    assert existing([directory / "a"]) == {as_path(f"s3://{BUCKET}/second/a")}
    assert list_files(directory, "*") == [directory / "a"] and list_tree(directory) == ["a"]
    without_gs(monkeypatch)
    with pytest.raises(UserError, match=r"^gs://bucket/a: the client of gs://"):
        as_path("gcs://bucket/a")


@pytest.fixture
def removals(s3: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requests to remove something, by name, as they are made."""
    made: list[str] = []
    client_class: Any = S3FileSystem
    call = client_class._call_s3

    async def counted(self: S3FileSystem, method: str, *arguments: Any, **options: Any) -> Any:
        if method.startswith("delete"):
            made.append(method)
        return await call(self, method, *arguments, **options)

    monkeypatch.setattr(S3FileSystem, "_call_s3", counted)
    return made


def test_a_tree_in_a_store_is_removed_in_one_request(removals: list[str]) -> None:
    for name in ("a", "b", "deep/c", "deep/d"):
        put(f"tree/{name}", b"x")
    put("tree-beside/a", b"x")
    remove_tree(as_path(f"s3://{BUCKET}/tree"))
    assert removals == ["delete_objects"]
    assert list_tree(as_path(f"s3://{BUCKET}/tree")) == []
    assert list_tree(as_path(f"s3://{BUCKET}/tree-beside")) == ["a"]
    remove_tree(as_path(f"s3://{BUCKET}/tree"))


def test_a_tree_whose_name_looks_like_a_pattern_is_removed_alone(s3: str) -> None:
    for name in ("run[1]/a", "run1/a"):
        put(name, b"x")
    remove_tree(as_path(f"s3://{BUCKET}/run[1]"))
    assert list_tree(as_path(f"s3://{BUCKET}/run[1]")) == []
    assert list_tree(as_path(f"s3://{BUCKET}/run1")) == ["a"]


def test_what_is_left_of_a_tree_is_asked_for_one_by_one(
    removals: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused(self: S3FileSystem, paths: list[str]) -> list[str]:
        return []  # as where a store keeps every object: the client does not raise

    monkeypatch.setattr(S3FileSystem, "_bulk_delete", refused)
    for name in ("a", "b"):
        put(f"kept/{name}", b"x")
    remove_tree(as_path(f"s3://{BUCKET}/kept"))
    assert removals == ["delete_object", "delete_object"]
    assert list_tree(as_path(f"s3://{BUCKET}/kept")) == []


def test_what_another_client_writes_is_seen_at_once(s3: str) -> None:
    path = as_path(f"s3://{BUCKET}/seen/a.json")
    assert not exists(path)
    put("seen/a.json", json.dumps(1).encode())
    assert exists(path) and list_files(path.parent, "*") == [path] and read_json(path) == 1
    client().delete_object(Bucket=BUCKET, Key="seen/a.json")
    assert not exists(path) and list_files(path.parent, "*") == []


@pytest.mark.parametrize(
    ("text", "remote", "text_shown"),
    [
        ("/a/b", False, "/a/b"),
        ("a:b/c", False, "a:b/c"),
        ("C:/x", False, "C:/x"),
        ("file:///a", False, "file:///a"),
        ("s3://b/k?x", True, "s3://b/k?x"),
        ("https://u:p@h/a?X-Signature=s", True, "https://h/a"),
        ("hf://datasets/a/b@main/c", True, "hf://datasets/a/b@main/c"),
    ],
)
def test_uris_are_told_from_paths_and_shown_without_secrets(text: str, remote: bool, text_shown: str) -> None:
    assert is_remote(text) == remote
    assert shown(text) == text_shown


@pytest.mark.parametrize("text", ["s3://", "s3:///", "gs://", "s3:/bucket/a", "s3:///bucket/a"])
def test_a_uri_that_names_no_bucket_is_no_path_of_this_machine(text: str) -> None:
    with pytest.raises(UserError, match=rf"^{text}: names no place in a store; expected \w+://BUCKET/PATH$"):
        as_path(text)
