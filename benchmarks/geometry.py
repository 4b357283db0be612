"""How much of the patch cap each resize rule uses, and how far it bends the aspect ratio.

    python benchmarks/geometry.py --lengths ../shared/lengths.py

Sizes: CC12M-like and OBELICS-like tables of a module with `cc12m(n, seed)`, `obelics(n, seed)` and
torchtitan's rule as `titan_resize(hw, patch_size, merge_size, max_patches)`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from shared.geometry import Geometry, resize_grid

SETTINGS = [(1, 256), (2, 1024)]  # merge, cap


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=Path, required=True, help="module with the length tables")
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    tables = load_module(options.lengths)
    rows: list[dict[str, Any]] = []
    for name in ("cc12m", "obelics"):
        sizes = getattr(tables, name)(options.samples, 0).image_hw
        for merge, cap in SETTINGS:
            geometries = {
                rule: Geometry(merge=merge, max_patches_per_image=cap, resize=rule)
                for rule in ("native", "fill")
            }
            grids = {rule: resize_grid(sizes[:, 0], sizes[:, 1], g) for rule, g in geometries.items()}
            # The cap of torchtitan's function counts merged tokens.
            grids["torchtitan"] = tables.titan_resize(sizes, 16, merge, cap // merge**2) // 16
            rows += [measure(name, rule, merge, cap, sizes, grid) for rule, grid in grids.items()]
    print(
        "sizes    rule        m  cap   of the cap unused   aspect error: median   95 %   worst   not resized"
    )
    for row in rows:
        print(
            f"{row['sizes']:8} {row['rule']:10} {row['merge']:2} {row['cap']:5} {row['unused']:15.2%} "
            f"{row['aspect_median']:20.2%} {row['aspect_p95']:8.2%} {row['aspect_max']:7.1%} {row['refused']:10}"
        )
    if options.json:
        print(json.dumps({"rows": rows}))


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("lengths", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SystemExit(f"geometry: {path}: no such module; give --lengths")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure(
    name: str, rule: str, merge: int, cap: int, sizes: np.ndarray[Any, Any], grid: np.ndarray[Any, Any]
) -> dict[str, Any]:
    used = grid[:, 0] > 0
    ratio = (grid[used, 1] / grid[used, 0]) / (sizes[used, 1] / sizes[used, 0])
    error = np.maximum(ratio, 1 / ratio) - 1
    return {
        "sizes": name,
        "rule": rule,
        "merge": merge,
        "cap": cap,
        "unused": float(1 - grid[used].prod(axis=1).mean() / cap),
        "aspect_median": float(np.median(error)),
        "aspect_p95": float(np.percentile(error, 95)),
        "aspect_max": float(error.max()),
        "refused": int((~used).sum()),
    }


if __name__ == "__main__":
    main()
