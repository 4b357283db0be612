"""Settings of the codecs: checked, and part of a plan's identity only where the codec reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from preprocess.identity import plan_identity
from tests.preprocess.inputs import make_config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"jpeg_quality": 0}, r"jpeg_quality must lie in \[1, 100\], got 0"),
        ({"jpeg_quality": 101}, r"jpeg_quality must lie in \[1, 100\], got 101"),
        ({"zstd_level": 0}, r"zstd_level must lie in \[1, 19\], got 0"),
        ({"zstd_level": 20}, r"zstd_level must lie in \[1, 19\], got 20"),
    ],
)
def test_a_setting_out_of_range_is_refused(tmp_path: Path, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, tmp_path / "a.tar", **settings)


@pytest.mark.parametrize(
    ("codec", "read"), [("raw", set()), ("zstd", {"zstd_level"}), ("jpeg", {"jpeg_quality"})]
)
def test_work_is_kept_when_a_setting_changes_that_its_codec_does_not_read(
    tmp_path: Path, codec: str, read: set[str]
) -> None:
    def identity(**settings: int) -> object:
        return plan_identity(make_config(tmp_path, tmp_path / "a.tar", codec=codec, **settings), {})

    for setting, value in (("zstd_level", 3), ("jpeg_quality", 90)):
        assert (identity(**{setting: value}) != identity()) == (setting in read), setting
