"""A job of each codec: the same packs, with the same pixels as codec raw, or near them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from preprocess.job import run_job
from preprocess.verify import verify_dataset
from shared.dataset import DataSet, open_dataset
from shared.errors import UserError
from shared.files import read_json
from shared.geometry import Geometry
from tests.preprocess.inputs import GEOMETRY, make_config, mixed_samples, write_samples

STILL = Geometry(patch_size=4, merge=2, temporal_patch_size=2, max_patches_per_image=16)


def built(directory: Path, codec: str, geometry: Geometry, **settings: int) -> DataSet:
    tar = write_samples(directory / "a.tar", mixed_samples(20))
    run_job(make_config(directory, tar, codec=codec, geometry=geometry, **settings))
    counts, faults = verify_dataset(directory / "out")
    assert faults == [] and counts["images"] == 20
    return open_dataset(directory / "out")


@pytest.mark.parametrize("geometry", [GEOMETRY, STILL], ids=["m2", "pt2"])
def test_zstd_holds_the_packs_of_raw_bit_for_bit(tmp_path: Path, geometry: Geometry) -> None:
    raw, zstd = (built(tmp_path / codec, codec, geometry) for codec in ("raw", "zstd"))
    assert zstd.num_packs("train") == raw.num_packs("train") > 1
    for number in range(raw.num_packs("train")):
        one, other = raw.pack("train", number), zstd.pack("train", number)
        for name in ("tokens_S", "labels_S", "positions_S", "patches_XP"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name
        places = ["token_start", "row", "offset", "t", "h", "w"]
        assert one.images[places].tolist() == other.images[places].tolist() and one.cost == other.cost
    for key in ("totals", "fill", "account"):
        found, wanted = ({**data.manifest[key]} for data in (zstd, raw))
        found.pop("bytes", None), wanted.pop("bytes", None)
        assert found == wanted


def test_the_setting_of_the_codec_is_in_the_manifest_and_in_the_bytes(tmp_path: Path) -> None:
    sizes: list[int] = []
    for quality in (50, 95):
        dataset = built(tmp_path / str(quality), "jpeg", GEOMETRY, jpeg_quality=quality)
        assert read_json(dataset.path / "dataset.json")["codec_settings"] == {"jpeg_quality": quality}
        sizes.append(sum(dataset.pack("train", n).stored.nbytes for n in range(dataset.num_packs("train"))))
    assert sizes[0] < 0.8 * sizes[1]


def test_a_library_that_is_missing_stops_the_job_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    config = make_config(tmp_path, write_samples(tmp_path / "a.tar", mixed_samples(1)), codec="zstd")
    with pytest.raises(UserError, match="codec 'zstd' needs zstandard"):
        run_job(config)
    assert not (tmp_path / "out").exists()
