"""The most memory that one picture takes while it is loaded, at the limits' default, for every format and mode.

    python benchmarks/image_memory.py

Each picture has as many pixels as `limits.max_pixels` allows, and is loaded in a process of its own; its peak is
the resident memory that the kernel counted, of which a worker that has loaded nothing holds the first line's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from preprocess.config import ImageConfig, ImageLimits
from preprocess.images import load_image, read_header
from shared.geometry import Geometry, resize_grid

# JPEG 2000 may have two thirds of it, WebP seven eighths.
SIDES = {"JPEG2000": (8_000, 5_333), "WEBP": (8_000, 7_000)}
DEFAULT = (8_000, 8_000)

# Name, Pillow's format, mode, options.
CASES: list[tuple[str, str, str, dict[str, Any]]] = [
    ("JPEG", "JPEG", "RGB", {"subsampling": 0}),
    ("JPEG, progressive 4:4:4", "JPEG", "RGB", {"subsampling": 0, "progressive": True}),
    ("JPEG, grey", "JPEG", "L", {}),
    ("JPEG, CMYK progressive", "JPEG", "CMYK", {"progressive": True}),
    ("PNG, RGB", "PNG", "RGB", {"compress_level": 1}),
    ("PNG, RGBA", "PNG", "RGBA", {"compress_level": 1}),
    ("PNG, palette", "PNG", "P", {"compress_level": 1}),
    ("PNG, 16-bit grey", "PNG", "I;16", {"compress_level": 1}),
    ("GIF", "GIF", "P", {}),
    # Not compressed: of one byte per pixel, or limits.max_bytes refuses it.
    ("BMP, palette", "BMP", "P", {}),
    ("PGM", "PPM", "L", {}),
    ("TIFF, LZW RGBA", "TIFF", "RGBA", {"compression": "tiff_lzw"}),
    ("TIFF, deflate CMYK", "TIFF", "CMYK", {"compression": "tiff_adobe_deflate"}),
    ("TIFF, deflate RGB, turned", "TIFF", "RGB", {"compression": "tiff_adobe_deflate", "exif": 6}),
    ("WebP, lossy RGBA", "WEBP", "RGBA", {"method": 0}),
    ("WebP, lossless RGBA", "WEBP", "RGBA", {"lossless": True, "method": 0, "quality": 0}),
    ("AVIF, RGBA 4:4:4", "AVIF", "RGBA", {"speed": 10, "subsampling": "4:4:4"}),
    ("JPEG 2000, RGBA", "JPEG2000", "RGBA", {"num_resolutions": 3}),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    if options.load:
        return load(options.load)
    rows = [{"case": "none", "mb": peak(Path("none"))}]
    with tempfile.TemporaryDirectory() as directory:
        for name, kind, mode, settings in CASES:
            path = Path(directory) / kind
            write(path, kind, mode, settings)
            rows.append({"case": name, "mb": peak(path), "bytes": path.stat().st_size})
            print(f"{name:26} {rows[-1]['mb']:6.0f} MB", flush=True)
    print(f"without a picture {rows[0]['mb']:.0f} MB, most {max(row['mb'] for row in rows):.0f} MB")
    if options.json:
        print(json.dumps({"rows": rows}))


def write(path: Path, kind: str, mode: str, settings: dict[str, Any]) -> None:
    """Slow waves: no format shrinks them to nothing, and none takes long over them."""
    height, width = SIDES.get(kind, DEFAULT)
    wave = np.sin(np.arange(width) / 300) * 60 + 128
    grey = (wave[None] + np.sin(np.arange(height) / 200)[:, None] * 60).astype(np.uint8)
    if mode == "I;16":
        picture = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(grey).convert("RGB" if mode == "CMYK" else mode)
        picture = picture.convert(mode)
    if mode == "RGBA":
        picture.putalpha(Image.fromarray(grey))
    if "exif" in settings:
        exif = Image.Exif()
        exif[0x0112] = settings["exif"]
        settings = {**settings, "exif": exif}
    picture.save(path, kind, **settings)


def peak(path: Path) -> float:
    command = [sys.executable, __file__, "--load", str(path)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def load(path: Path) -> None:
    torch.set_num_threads(1)
    if path.is_file():
        with path.open("rb") as file:
            header = read_header(file, limits=ImageLimits())
        geometry, size = Geometry(merge=1, max_patches_per_image=256), (header.height, header.width)
        [[h, w]] = resize_grid(np.array([size[0]]), np.array([size[1]]), geometry).tolist()
        # Scaled decoding takes less: what the full decode takes is what a narrow picture may take.
        config = ImageConfig(dct_scaling=False)
        data = path.read_bytes()
        load_image(data, size=size, grid=(h, w), geometry=geometry, limits=ImageLimits(), config=config)
    # Of this program alone: getrusage would count what the process was before it became this program.
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    print(int(line.split()[1]) / 1024)


if __name__ == "__main__":
    main()
