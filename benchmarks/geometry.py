"""How much of the patch cap each resize rule uses, and how far it bends the aspect ratio.

    python benchmarks/geometry.py --lengths ../shared/lengths.py

Sizes: CC12M-like and OBELICS-like tables of a module with `cc12m(n, seed)`, `obelics(n, seed)` and
torchtitan's rule as `titan_resize(hw, patch_size, merge_size, max_patches)`.

Then what no rule can do better: the least share of the cap that is left if half of the pictures are to bend less
than 2 % and none more than a bound, by trying every grid for every size. Once for rules that are free to treat two
pictures of the same shape differently, and once for those that are not.
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
    bounds = [least_unused(tables.cc12m(options.samples, 0).image_hw, 256, worst) for worst in (0.05, 0.1)]
    print("half of cc12m's pictures below 2 % at a cap of 256, least unused:  any rule   one grid per shape")
    for row in bounds:
        print(f"none above {row['worst']:3.0%} {row['any_rule']:62.2%} {row['per_shape']:20.2%}")
    if options.json:
        print(json.dumps({"rows": rows, "bounds": bounds}))


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("lengths", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SystemExit(f"geometry: {path}: no such module; give --lengths")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def least_unused(sizes: np.ndarray[Any, Any], cap: int, worst: float, true: float = 0.02) -> dict[str, float]:
    """Bounds over all rules of which half of the pictures bend less than `true`, and none more than `worst`."""
    unique_u2, count_u = np.unique(sizes, axis=0, return_counts=True)
    weight_u = count_u / count_u.sum()
    any_u, true_u = least_unused_of_size(unique_u2, cap, (worst, true))
    extra_u = true_u - any_u
    base = float(any_u @ weight_u)
    # Any rule: what costs least per picture first, the last size only as far as it is needed.
    order = np.argsort(extra_u, kind="stable")
    before = np.concatenate([[0.0], np.cumsum(weight_u[order])[:-1]])
    taken = np.clip(0.5 - before, 0, weight_u[order])
    # One shape: sides whose ratio, the longer to the shorter, rounds to the same per cent of its logarithm.
    ratio_u = np.log(unique_u2.max(axis=1) / unique_u2.min(axis=1))
    _, shape_u = np.unique(np.rint(ratio_u / 0.01).astype(np.int64), return_inverse=True)
    costs, weights = np.bincount(shape_u, weight_u * extra_u), np.bincount(shape_u, weight_u)
    return {
        "worst": worst,
        "any_rule": base + float(extra_u[order] @ taken),
        "per_shape": base + cheapest_half(costs, weights),
    }


def least_unused_of_size(sizes_u2: np.ndarray[Any, Any], cap: int, bends: tuple[float, ...]) -> Any:
    """For each bend, the least unused share of the cap over all grids that bend no more: one row per bend."""
    cells = np.arange(1, cap + 1)
    a, b = (side.reshape(-1) for side in np.meshgrid(cells, cells, indexing="ij"))
    a, b = a[keep := a * b <= cap], b[keep]
    found = np.ones((len(bends), len(sizes_u2)))
    for start in range(0, len(sizes_u2), 1000):
        height, width = sizes_u2[start : start + 1000, :1], sizes_u2[start : start + 1000, 1:]
        inside = ((a == 1) | (a * 16 <= height)) & ((b == 1) | (b * 16 <= width))
        ratio = (a * width) / (b * height)
        bend = np.maximum(ratio, 1 / ratio) - 1
        for row, limit in enumerate(bends):
            unused = np.where(inside & (bend <= limit), 1 - a * b / cap, 1.0)
            found[row, start : start + 1000] = unused.min(axis=1)
    return found


def cheapest_half(costs: np.ndarray[Any, Any], weights: np.ndarray[Any, Any]) -> float:
    """Least cost of a choice of shapes that hold half of all weight; weights are rounded up to 1 / 400,000."""
    steps = 400_000
    least = np.full(steps // 2 + 1, np.inf)  # index: the weight that is still missing
    least[-1] = 0.0
    for cost, units in zip(costs, np.ceil(weights * steps).astype(np.int64).tolist(), strict=True):
        chosen = np.concatenate([[least[: units + 1].min()], least[units + 1 :]])
        least[: len(chosen)] = np.minimum(least[: len(chosen)], chosen + cost)
    return float(least[0])


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
