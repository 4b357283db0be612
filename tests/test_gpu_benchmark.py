"""The benchmark for GPUs runs, on a CPU and tiny: what cannot be measured here must at least not be broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_gpu_benchmark_runs_dry(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    words = [
        "benchmarks/gpu.py",
        "--dry-run",
        "--steps",
        "2",
        "--out",
        str(tmp_path / "out.json"),
        "--json",
    ]
    result = subprocess.run(
        [sys.executable, *words], cwd=root, capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert json.loads(result.stdout.splitlines()[-1]) == figures
    case = figures["cases"]["tiny"]
    assert case["tokens_per_s"] > 0 and case["useful_mfu"] is None and "failed" not in case
    assert set(figures["checks"]) == {"sdpa", "sdpa selective"}
