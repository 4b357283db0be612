"""Raw files: ranges read whole or not at all, spans that behave as files, patterns that name each file once."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess.inputs import Span, expand_paths, read_range
from shared.errors import UserError
from tests.preprocess.inputs import Reads, noise


def test_a_range_that_one_call_does_not_return_whole_is_read_in_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytes(range(256)) * 10
    (tmp_path / "a").write_bytes(b"before" + content + b"behind")
    Reads(monkeypatch, at_most=999)
    assert read_range(str(tmp_path / "a"), 6, len(content)) == content
    assert read_range(str(tmp_path / "a"), 6, 0) == b""


@settings(max_examples=100, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.integers(0, 2), st.integers(-20_000, 40_000), st.sampled_from([None, -1, 0, 1, 9000, 1 << 60])
        )
    )
)
def test_a_span_reads_and_seeks_as_if_its_bytes_were_a_file_of_their_own(
    steps: list[tuple[int, int, int | None]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "span"
    content = noise(0, 100, 100).tobytes()
    if not path.exists():
        path.write_bytes(b"before" + content + b"behind")
    span, expected = Span(str(path), 6, len(content)), io.BytesIO(content)
    for whence, offset, size in steps:
        if (0, expected.tell(), len(content))[whence] + offset >= 0:
            assert span.seek(offset, whence) == expected.seek(offset, whence)
        assert span.read(size) == expected.read(size)
        assert span.tell() == expected.tell()


def test_a_file_that_shrank_or_went_since_the_scan_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=rf"{path} is shorter than at the scan"):
        read_range(str(path), 90, 11)
    with pytest.raises(UserError, match="b is gone since the scan; put it back"):
        read_range(str(tmp_path / "b"), 0, 10)


def test_paths_and_patterns_name_every_file_once_in_order(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "c.txt"):
        (tmp_path / name).touch()
    found = expand_paths("web", (f"{tmp_path}/b.tar", f"{tmp_path}/*.tar"))
    assert found == [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]
    for path, message in (("x.tar", "no such file"), ("*.zip", "matches no file"), ("", "no such file")):
        with pytest.raises(UserError, match=f"{message}; correct sources.web.paths"):
            expand_paths("web", (f"{tmp_path}/{path}",))


def test_a_file_is_read_once_however_it_is_spelled_and_folders_are_no_match(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "x[1].jsonl", "x1.jsonl"):
        Path(name).touch()
    Path("folder.jsonl").mkdir()
    assert expand_paths("web", ("a.jsonl", "./a.jsonl", ".//a.jsonl", "./a*")) == ["a.jsonl"]
    # As a pattern it means x1.jsonl.
    assert expand_paths("web", ("x[1].jsonl",)) == ["x[1].jsonl"]
    assert expand_paths("web", ("*.jsonl",)) == ["a.jsonl", "x1.jsonl", "x[1].jsonl"]
    with pytest.raises(UserError, match="'f\\*' matches no file"):
        expand_paths("web", ("f*",))


def test_a_name_that_is_not_utf8_is_refused_in_one_line(tmp_path: Path) -> None:
    Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.jsonl")).touch()
    with pytest.raises(
        UserError, match=r"source 'web': '.*caf\\udce9.jsonl': its name is not UTF-8"
    ) as error:
        expand_paths("web", (f"{tmp_path}/*",))
    assert str(error.value).isascii() and "\n" not in str(error.value)


def test_an_error_of_a_read_names_the_file() -> None:
    # The kernel refuses to read the first page of a process: EIO, as from a damaged disk.
    with pytest.raises(OSError, match="Input/output error") as caught:
        read_range("/proc/self/mem", 0, 8)
    assert caught.value.filename == "/proc/self/mem"
    with pytest.raises(OSError, match="Input/output error") as caught:
        Span("/proc/self/mem", 0, 8).read()
    assert caught.value.filename == "/proc/self/mem"
