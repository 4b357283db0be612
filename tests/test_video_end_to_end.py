"""Videos in tars and tables -> shards -> batch -> encoder, compared with what is known of their frames."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from preprocess.budgets import BudgetConfig
from preprocess.config import ImageLimits, PlanConfig, PreprocessConfig, VideoConfig
from preprocess.inspect import describe_pack, pack_record
from preprocess.job import run_job
from preprocess.sources.captions import CaptionsConfig
from preprocess.sources.webdataset import WebDatasetConfig
from preprocess.verify import verify_dataset
from shared.dataset import DataSet, open_dataset
from shared.geometry import Geometry
from tests.preprocess.inputs import byte_tokenizer, encode, noise, write_tar
from tests.preprocess.videos import encode_video, frame_numbers, greys
from trainer.attention import segment_mask
from trainer.data.batch import Batch, BatchShape, assemble_batch
from trainer.models.siglip2 import Siglip2Config, Siglip2Encoder
from trainer.models.vision import frame_segments

GEOMETRY = Geometry(patch_size=4, merge=2, max_patches_per_image=16)
# 4 frames a second, and 32 patches for a video of 4 frames: 8 for each.
VIDEO = VideoConfig(fps=4, max_patches_per_video=32)


def run(directory: Path, source: Any, **changes: Any) -> DataSet:
    settings: dict[str, Any] = {
        "output": str(directory / "out"),
        "tokenizer": str(byte_tokenizer(directory / "tokenizer")),
        "sources": {"clips": source},
        "budget": BudgetConfig(S=64, N=2, L=32),
        "geometry": GEOMETRY,
        "video": VIDEO,
        "executor": "serial",
        "plan": PlanConfig(shard_bytes=1 << 20, duplicates="ignore"),
    }
    run_job(PreprocessConfig(**{**settings, **changes}))
    dataset = open_dataset(directory / "out")
    assert verify_dataset(dataset.path)[1] == []
    return dataset


def of_tar(path: Path, **changes: Any) -> WebDatasetConfig:
    return WebDatasetConfig(paths=(str(path),), max_reject_rate=1.0, **changes)


def batch_of(dataset: DataSet, number: int = 0) -> Batch:
    shape = BatchShape(
        packs=1, budget=dataset.budget, geometry=dataset.geometry, pad_token=dataset.tokens.pad
    )
    return assemble_batch([dataset.pack("train", number)], [dataset.document_spans("train", number)], shape)


def images_of(dataset: DataSet) -> dict[str, tuple[tuple[int, int, int], np.ndarray]]:
    """Key -> grid and frames of the one image or video of every sample."""
    found: dict[str, tuple[tuple[int, int, int], np.ndarray]] = {}
    for number in range(dataset.num_packs("train")):
        pack = dataset.pack("train", number)
        for place, image in enumerate(pack.images):
            [key] = [
                document.key
                for document in dataset.documents("train", number)
                if document.start <= image["token_start"] < document.start + document.length
            ]
            t, h, w = (int(image[name]) for name in "thw")
            m, p, pt = (
                dataset.geometry.merge,
                dataset.geometry.patch_size,
                dataset.geometry.temporal_patch_size,
            )
            cells = pack.read_image(place).reshape(t, h // m, w // m, m, m, pt, p, p, 3)
            frames = cells.transpose(0, 5, 1, 3, 6, 2, 4, 7, 8).reshape(t * pt, h * p, w * p, 3)
            found[key] = (t, h, w), frames
    return found


def rejects_of(dataset: DataSet) -> dict[str, str]:
    table = pq.read_table(dataset.path / "rejects.parquet").to_pylist()
    return {reject["key"]: reject["reason"] for reject in table}


MEMBERS = [
    ("a.mp4", encode_video(greys(10))),
    ("a.txt", b"ten frames of grey"),
    ("b.webm", encode_video(greys(20), "libvpx-vp9", "webm")),
    ("b.txt", b"twenty"),
    ("c.png", encode(noise(0, 16, 16))),
    ("c.txt", b"a still"),
    ("d.mp4", encode_video(greys(10))[:400]),
    ("d.txt", b"cut off"),
]


@pytest.mark.parametrize("packed", [False, True])
def test_videos_and_pictures_of_one_tar_are_packed(tmp_path: Path, packed: bool) -> None:
    path = write_tar(tmp_path / "a.tar", MEMBERS)
    if packed:
        path.with_suffix(".tar.gz").write_bytes(gzip.compress(path.read_bytes()))
        path = path.with_suffix(".tar.gz")
    dataset = run(tmp_path, of_tar(path))
    found = images_of(dataset)
    assert found.keys() == {"a", "b", "c"}
    # One second at 4 a second; 8 patches of a frame of 2 : 3 are 2 x 4.
    grid, frames = found["a"]
    assert grid == (4, 2, 4) and frame_numbers(frames) == [1, 3, 6, 8]
    # Two seconds: 8 frames of one cell each.
    grid, frames = found["b"]
    assert grid == (8, 2, 2) and frame_numbers(frames) == [1, 3, 6, 8, 11, 13, 16, 18]
    grid, frames = found["c"]
    assert grid == (1, 4, 4) and np.array_equal(frames[0], noise(0, 16, 16))
    assert rejects_of(dataset) == {"d": "video_unreadable"}


def test_the_batch_says_of_every_patch_which_frame_it_is_of(tmp_path: Path) -> None:
    dataset = run(tmp_path, of_tar(write_tar(tmp_path / "a.tar", MEMBERS[:2])))
    batch = batch_of(dataset)
    assert batch.grid_thw_NL3[0, :, 0].tolist() == [t for t in range(4) for _ in range(8)]
    # Cell by cell: two cells of 2 x 2 beside each other.
    rows, columns = [0, 0, 1, 1] * 2, [0, 1, 0, 1, 2, 3, 2, 3]
    assert batch.grid_thw_NL3[0, :, 1].tolist() == rows * 4
    assert batch.grid_thw_NL3[0, :, 2].tolist() == columns * 4
    assert batch.image_ids_NL[0].tolist() == [0] * 32 and (batch.image_ids_NL[1] == -1).all()
    # 32 patches are 8 visual tokens, in order.
    assert batch.visual_index_BS[batch.visual_index_BS >= 0].tolist() == list(range(8))


def test_a_temporal_patch_of_two_frames_holds_both_and_a_still_twice(tmp_path: Path) -> None:
    geometry = dataclasses.replace(GEOMETRY, temporal_patch_size=2)
    dataset = run(tmp_path, of_tar(write_tar(tmp_path / "a.tar", MEMBERS[:6])), geometry=geometry)
    assert dataset.geometry.values_per_patch == 2 * 4 * 4 * 3
    found = images_of(dataset)
    # The same four frames in two temporal patches of 16 patches each: 2 x 2 cells are the truest to 2 : 3.
    grid, frames = found["a"]
    assert grid == (2, 4, 4) and frame_numbers(frames) == [1, 3, 6, 8]
    grid, frames = found["c"]
    assert grid == (1, 4, 4) and np.array_equal(frames, np.stack([noise(0, 16, 16)] * 2))


def test_a_frame_never_has_more_patches_than_a_picture(tmp_path: Path) -> None:
    # Two frames would have 16 patches each; a picture may have 8.
    geometry = dataclasses.replace(GEOMETRY, max_patches_per_image=8)
    video = dataclasses.replace(VIDEO, min_frames=1, max_frames=2)
    dataset = run(
        tmp_path, of_tar(write_tar(tmp_path / "a.tar", MEMBERS[:2])), geometry=geometry, video=video
    )
    assert images_of(dataset)["a"][0] == (2, 2, 4)


def test_videos_by_path_in_a_table(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mkv").write_bytes(encode_video(greys(10), container="matroska"))
    with open(tmp_path / "captions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [("clip", "caption"), ("a.mkv", "grey"), ("gone.mp4", "no file"), ("../captions.csv", "outside")]
        )
    source = CaptionsConfig(
        paths=(str(tmp_path / "captions.csv"),), video="clip", image_root="clips", max_reject_rate=1.0
    )
    dataset = run(tmp_path, source)
    [(grid, frames)] = images_of(dataset).values()
    assert grid == (4, 2, 4) and frame_numbers(frames) == [1, 3, 6, 8]
    assert rejects_of(dataset) == {"captions.csv#1": "video_missing", "captions.csv#2": "video_outside_root"}


def damaged_in_the_middle() -> bytes:
    """A video whose header and first frame are whole."""
    data = bytearray(encode_video(greys(10), "mpeg4", key_every=12))
    middle = data.index(b"mdat") + 100
    end = data.index(b"moov") - 8
    data[middle:end] = bytes(end - middle)
    return bytes(data)


@pytest.mark.parametrize("bad_media", ["reject", "drop"])
def test_a_video_that_cannot_be_decoded_costs_its_sample_or_itself(tmp_path: Path, bad_media: str) -> None:
    members = [("a.mp4", damaged_in_the_middle()), ("a.txt", b"grey"), *MEMBERS[2:4]]
    dataset = run(tmp_path, of_tar(write_tar(tmp_path / "a.tar", members), bad_media=bad_media))
    assert rejects_of(dataset) == {"a": "video_corrupt"}
    assert images_of(dataset).keys() == {"b"}
    account = dataset.manifest["account"]["clips"]
    assert (account["read"], account["packed"]) == ((2, 1) if bad_media == "reject" else (2, 2))


def test_a_video_costs_the_attention_inside_its_frames(tmp_path: Path) -> None:
    dataset = run(tmp_path, of_tar(write_tar(tmp_path / "a.tar", MEMBERS[:2])))
    [length] = [document.length for document in dataset.documents("train", 0)]
    # 4 frames of 8 patches; see preprocess/cost.py for the model's numbers.
    linear = 6 * (1_240_000_000 * length + 93_000_000 * 32)
    attention = 6 * 16 * 2048 * length**2 + 12 * 12 * 768 * 4 * 8**2
    assert dataset.pack("train", 0).cost == linear + attention


def test_inspect_tells_a_video_and_its_frames(tmp_path: Path) -> None:
    dataset = run(tmp_path, of_tar(write_tar(tmp_path / "a.tar", MEMBERS[:2])))
    lines = describe_pack(pack_record(dataset, "train", 0), dataset)
    assert any(
        "video, 4 frames, of 4 x 2 x 4 patches: vision row 0, patches [0, 32)" in line for line in lines
    )


def test_the_same_video_gives_the_same_bytes_with_other_settings_of_the_job(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", MEMBERS)
    shards = []
    for name, duplicates in (("one", "ignore"), ("two", "count")):
        dataset = run(
            tmp_path / name, of_tar(path), plan=PlanConfig(shard_bytes=1 << 20, duplicates=duplicates)
        )
        shards.append([shard.checksum for shard in dataset.shards])
    assert shards[0] == shards[1]


def test_other_sampling_makes_the_index_again(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", MEMBERS[:2])
    run(tmp_path, of_tar(path))
    again = run(tmp_path, of_tar(path), video=dataclasses.replace(VIDEO, fps=8), on_change="rebuild")
    assert images_of(again)["a"][0][0] == 8


def test_a_cap_beyond_a_vision_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"max_patches_per_video 36 must lie between .* and budget.L 32"):
        run(tmp_path, of_tar(tmp_path / "a.tar"), video=VideoConfig(max_patches_per_video=36))


@pytest.mark.parametrize("pt", [1, 2])
def test_the_encoder_sees_a_video_as_its_frames_one_by_one(tmp_path: Path, pt: int) -> None:
    geometry = dataclasses.replace(GEOMETRY, temporal_patch_size=pt)
    video = dataclasses.replace(VIDEO, min_frames=1, max_frames=2 * pt)
    dataset = run(
        tmp_path,
        of_tar(write_tar(tmp_path / "a.tar", MEMBERS[:2])),
        geometry=geometry,
        video=video,
        limits=ImageLimits(),
    )
    batch = batch_of(dataset)
    count = int((batch.image_ids_NL[0] >= 0).sum())
    assert count == 32 and batch.grid_thw_NL3[0, count // 2 : count, 0].tolist() == [1] * (count // 2)
    torch.manual_seed(0)
    sizes = Siglip2Config(
        hidden_size=16,
        intermediate_size=32,
        num_layers=2,
        num_heads=2,
        patch_size=4,
        temporal_patch_size=pt,
        position_grid=4,
    )
    encoder = Siglip2Encoder(sizes, geometry.mean, geometry.std)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)

    def encoded(batch: Batch) -> torch.Tensor:
        segments = frame_segments(batch.image_ids_NL, batch.grid_thw_NL3)
        mask = segment_mask(segments)
        inputs = batch.pixel_values_NLP, batch.grid_thw_NL3, batch.image_sizes_NL2, segments, mask
        with torch.no_grad():
            return encoder(*inputs)[0, :count]

    # The same patches as two pictures: each its own image, each of one frame.
    ids, grid = batch.image_ids_NL.clone(), batch.grid_thw_NL3.clone()
    ids[0, count // 2 : count] = 1
    grid[0, :count, 0] = 0
    apart = encoded(dataclasses.replace(batch, image_ids_NL=ids, grid_thw_NL3=grid))
    assert torch.equal(encoded(batch), apart)
    # And not as one picture.
    merged = encoded(dataclasses.replace(batch, grid_thw_NL3=grid))
    assert not torch.allclose(merged, apart, atol=1e-3)


def test_a_real_clip_arrives_in_a_batch(tmp_path: Path, shared_data: Path) -> None:
    clip = (shared_data / "video" / "realshort.mp4").read_bytes()
    record = json.dumps({"text": "a short clip"}).encode()
    path = write_tar(tmp_path / "a.tar", [("clip.mp4", clip), ("clip.json", record)])
    dataset = run(
        tmp_path,
        of_tar(path, caption="json:text"),
        geometry=Geometry(patch_size=16, merge=2, max_patches_per_image=256),
        budget=BudgetConfig(S=256, N=1, L=256),
        video=VideoConfig(),
    )
    # 1.2 s at two a second are 2 frames, 4 at least; 256 patches are 64 each, of 3 : 4 that is 6 x 8.
    batch = batch_of(dataset)
    t = batch.grid_thw_NL3[0, :, 0]
    assert [int((t == frame).sum()) for frame in range(4)] == [48] * 4
    frames = images_of(dataset)["clip"][1]
    assert frames.shape == (4, 96, 128, 3) and frames.std() > 20
