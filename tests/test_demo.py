"""The demo's promise: after a few minutes on two cores the model looks at the pictures."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_demo_learns_to_look_at_its_pictures(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for words in (
        ["preprocess", "synthesize", "demo/raw"],
        ["preprocess", "run", "configs/preprocess/demo.toml", "--executor", "serial"],
        ["trainer", "train", "configs/train/demo.toml", "--json"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=tmp_path, capture_output=True, text=True, timeout=1800
        )
        assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["steps"] == 700
    # A model that ignores pictures has a gain of 0.
    assert result["eval"]["vision_gain"] >= 0.25
