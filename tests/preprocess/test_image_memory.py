"""What large pictures leave behind: a worker that has loaded many holds no more than one that has loaded one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

# Resident memory without files, in MB, after each of four pictures of 17 megapixels.
LOAD = """
import sys
from pathlib import Path
from preprocess.config import ImageConfig, ImageLimits
from preprocess.images import load_image
from shared.geometry import Geometry

for number in range(4):
    data = Path(sys.argv[1]).read_bytes()
    load_image(data, size=(4200, 4200), grid=(16, 16), geometry=Geometry(), limits=ImageLimits(), config=ImageConfig())
    status = Path("/proc/self/status").read_text()
    print(next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) // 1000)
"""


def test_large_pictures_leave_no_memory_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.webp"
    ramp = np.add.outer(np.arange(4200), np.arange(4200)).astype(np.uint8)
    Image.fromarray(ramp).convert("RGB").save(path, method=0)
    child = subprocess.run(
        [sys.executable, "-c", LOAD, str(path)], check=True, capture_output=True, text=True
    )
    first, *_, last = map(int, child.stdout.split())
    # As RGB they take 53 MB each, and 70 in Pillow.
    assert last < first + 25 and first < 320, child.stdout
