"""Whole jobs over videos: from a tar, a table and a folder, under Ray and from stores, with the same bytes."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from preprocess.config import PreprocessConfig, RayConfig, VideoConfig
from preprocess.job import run_job
from preprocess.sources.captions import CaptionsConfig
from preprocess.sources.webdataset import WebDatasetConfig
from shared.dataset import open_dataset
from tests.preprocess.inputs import make_config, write_tar
from tests.preprocess.stores import BUCKET, put, s3_server, web_server
from tests.preprocess.videos import encode_video, greys


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.tar: three captioned clips, one of them cut short. b.csv: two clips by path, one of them not there."""
    directory = tmp_path_factory.mktemp("raw")
    clips = [encode_video(greys(8 + n, 16, 16), rate=4) for n in range(3)]
    clips[2] = clips[2][: len(clips[2]) // 2]
    members = [(f"{n}.mp4", clip) for n, clip in enumerate(clips)] + [
        (f"{n}.txt", f"clip {n}".encode()) for n in range(3)
    ]
    write_tar(directory / "a.tar", sorted(members))
    (directory / "clips").mkdir()
    (directory / "clips" / "here.mp4").write_bytes(clips[0])
    with open(directory / "b.csv", "w", newline="") as file:
        csv.writer(file).writerows([("video", "caption"), ("here.mp4", "here"), ("gone.mp4", "gone")])
    return directory


def sources(root: str) -> dict[str, WebDatasetConfig | CaptionsConfig]:
    return {
        "tars": WebDatasetConfig(paths=(f"{root}/a.tar",), max_reject_rate=1.0),
        "tables": CaptionsConfig(
            paths=(f"{root}/b.csv",), video="video", image_root=f"{root}/clips", max_reject_rate=1.0
        ),
    }


@pytest.fixture(scope="module")
def serial(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> PreprocessConfig:
    """A finished job over all of it in this process, from this machine."""
    directory = tmp_path_factory.mktemp("serial")
    video = VideoConfig(fps=2, min_frames=2, max_frames=4)
    config = make_config(directory, directory, sources=sources(str(raw)), video=video)
    account = run_job(config)["account"]
    assert (account["tars"]["packed"], account["tables"]["packed"]) == (2, 1)
    assert account["tars"]["rejected"] == {"video_unreadable": 1}
    assert account["tables"]["rejected"] == {"video_missing": 1}
    return config


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as address:
        yield address


def shards(config: PreprocessConfig) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in (Path(config.output) / "shards").iterdir()}
    return {**found, "dataset.json": (Path(config.output) / "dataset.json").read_bytes()}


def test_there_are_videos_in_what_is_compared(serial: PreprocessConfig) -> None:
    dataset = open_dataset(Path(serial.output))
    packs = [dataset.pack(split, n) for split in dataset.splits for n in range(dataset.num_packs(split))]
    assert sum(int((pack.images["t"] > 1).sum()) for pack in packs) == 3


@pytest.mark.slow
def test_videos_under_ray_are_those_of_one_process(serial: PreprocessConfig, tmp_path: Path) -> None:
    config = replace(serial, output=str(tmp_path / "out"), executor="ray", ray=RayConfig(workers=2))
    run_job(config)
    assert shards(config) == shards(serial)


def test_videos_in_an_object_store_are_those_of_this_machine(
    raw: Path, s3: str, serial: PreprocessConfig, tmp_path: Path
) -> None:
    for path in raw.rglob("*"):
        if path.is_file():
            put(f"videos/{path.relative_to(raw)}", path.read_bytes())
    root = f"s3://{BUCKET}/videos"
    config = replace(serial, output=str(tmp_path / "out"), sources=sources(root))
    run_job(config)
    assert shards(config) == shards(serial)


def test_videos_on_a_web_server_are_those_of_this_machine(
    raw: Path, serial: PreprocessConfig, tmp_path: Path
) -> None:
    with web_server(raw) as web:
        named = sources(web.address)
        # A signed URL: its query holds slashes, and is no part of the name.
        signed = {
            name: replace(source, paths=(f"{source.paths[0]}?X-Amz-Credential=k/s3/v4&X-Amz-Signature=0.x",))
            for name, source in named.items()
        }
        signed["tables"] = replace(signed["tables"], image_root="clips")
        for name, chosen in (("named", named), ("signed", signed)):
            config = replace(serial, output=str(tmp_path / name), sources=chosen)
            run_job(config)
            assert shards(config) == shards(serial), name
