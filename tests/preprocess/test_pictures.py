"""Pictures as tables name them: where their bytes are, and why some are not there."""

from __future__ import annotations

import base64
import os
import resource
from pathlib import Path
from typing import Any

import pytest

from preprocess.samples import Media, Missing, Place
from preprocess.sources.pictures import picture, picture_root
from tests.preprocess.inputs import png

PICTURE = png(9, 7)
CODED = base64.b64encode(PICTURE).decode()


@pytest.fixture
def root(tmp_path: Path) -> str:
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a.png").write_bytes(PICTURE)
    (tmp_path / "secret.png").write_bytes(PICTURE)
    return str(folder)


@pytest.mark.parametrize(
    "value",
    [
        PICTURE,
        {"bytes": PICTURE, "path": "elsewhere.png"},
        {"bytes": CODED, "path": None},
        f"data:image/png;base64,{CODED}",
        f"DATA:;BASE64,{CODED}",
        {"url": f"data:image/png;base64,{CODED}"},
        CODED,
        "\n".join(CODED[start : start + 76] for start in range(0, len(CODED), 76)),
    ],
    ids=["bytes", "struct", "struct of base64", "data", "DATA", "url of data", "base64", "base64 in lines"],
)
def test_bytes_have_no_place_and_are_given_as_they_are(root: str, value: Any) -> None:
    found = picture(value, root)
    assert isinstance(found, Media) and found.place is None
    assert found.file.read() == PICTURE


@pytest.mark.parametrize(
    "value",
    ["deep/a.png", "./deep/../deep//a.png", {"bytes": None, "path": "deep/a.png"}, {"path": "deep/a.png"}],
)
def test_a_path_is_a_file_that_is_read_from_where_it_lies(root: str, value: Any) -> None:
    path = f"{root}/deep/a.png"
    for name in (value, path, f"file://{path}"):
        found = picture(name, root)
        assert isinstance(found, Media) and found.place == Place(path, 0, len(PICTURE))
        assert found.file.read() == PICTURE


def test_links_in_the_root_are_followed(root: str) -> None:
    os.symlink(os.path.dirname(root), f"{root}/out")
    found = picture("out/secret.png", root)
    assert isinstance(found, Media) and found.file.read() == PICTURE


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("../secret.png", "image_outside_root"),
        ("deep/../../secret.png", "image_outside_root"),
        ("/etc/passwd", "image_outside_root"),
        ("file:///etc/passwd", "image_outside_root"),
        ("file://../secret.png", "image_outside_root"),
        ({"bytes": None, "path": "../pictures-too/a.png"}, "image_outside_root"),
        ("none.png", "image_missing"),
        ("deep", "image_missing"),
        ("deep/a.png/b.png", "image_missing"),
        ("a\0.png", "image_missing"),
        ("\udc80.png", "image_missing"),
        ("x" * 300 + ".png", "image_missing"),
        (("y" * 200 + "/") * 30 + ".png", "image_missing"),
        (None, "image_missing"),
        ("", "image_missing"),
        ({}, "image_missing"),
        ({"bytes": None, "path": None}, "image_missing"),
        ("https://example.org/a.png", "image_not_fetched"),
        ("HTTP://example.org/a.png", "image_not_fetched"),
        ({"url": "http://example.org/a.png"}, "image_not_fetched"),
        ("s3://bucket/a.png", "image_not_fetched"),
        ("data:image/png;base64", "image_malformed"),
        ("data:image/png,abc", "image_malformed"),
        ("data:image/png;base64,QU$JD", "image_malformed"),
        ("A" * 257, "image_malformed"),
        (7, "image_malformed"),
        ([PICTURE], "image_malformed"),
        ({"bytes": {"bytes": PICTURE}}, "image_malformed"),
    ],
)
def test_what_is_not_there_has_a_reason(root: str, value: Any, reason: str) -> None:
    found = picture(value, root)
    assert isinstance(found, Missing) and found.reason == reason and found.detail
    assert "\n" not in found.detail and len(found.detail) < 600


def test_what_is_not_fetched_says_how_to_get_it(root: str) -> None:
    assert picture("https://example.org/a.png", root) == Missing(
        "image_not_fetched",
        "https://example.org/a.png: `python -m preprocess fetch` stores pictures, no videos",
    )


@pytest.mark.parametrize(
    ("unit", "image_root", "root"),
    [
        ("/data/a.json", "", "/data/"),
        ("/data/a.json", "images", "/data/images"),
        ("/data/a.json", "../images", "/data/../images"),
        ("/data/a.json", "/pictures", "/pictures"),
        ("/data/a.json", "s3://bucket/images", "s3://bucket/images"),
        ("s3://bucket/t/a.json", "images", "s3://bucket/t/images"),
    ],
)
def test_the_root_is_relative_to_the_table(unit: str, image_root: str, root: str) -> None:
    assert picture_root(unit, image_root) == root


def test_the_root_of_the_machine_lets_every_absolute_path_in(root: str) -> None:
    assert isinstance(picture(f"{root}/deep/a.png", "/"), Media)


def test_a_batch_of_pictures_may_name_more_files_than_a_process_may_open(root: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    names = [f"{number}.png" for number in range(400)]
    for name in names:
        Path(root, name).write_bytes(PICTURE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        found = [picture(name, root) for name in names]
        assert all(isinstance(media, Media) and media.file.read() == PICTURE for media in found)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
