"""`report/stats.json` and the table a person reads, from index files and shards, never from raw inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from preprocess.index import IndexedUnit, read_index
from preprocess.samples import TEXT
from shared.geometry import Budget

PERCENTILES = (5, 50, 95, 100)


def collect_stats(
    units: Sequence[IndexedUnit],
    results: Mapping[str, Mapping[str, Any]],
    account: Mapping[str, Any],
    budget: Budget,
) -> dict[str, Any]:
    """Everything the report shows. `results` are the shards' result files by shard name."""
    splits: dict[str, dict[str, int]] = {}
    for name, result in results.items():
        line = splits.setdefault(name.rpartition("-")[0], {"shards": 0, "packs": 0, "bytes": 0})
        line["shards"] += 1
        line["packs"] += result["packs"]
        line["bytes"] += result["bytes"]
        for key, value in result["totals"].items():
            line[key] = line.get(key, 0) + value
    return {
        "budget": {"S": budget.S, "N": budget.N, "L": budget.L},
        "fill": fills(results.values(), budget),
        "splits": splits,
        "account": dict(account),
        "samples": _index_stats(units),
    }


def fills(results: Any, budget: Budget) -> dict[str, float]:
    """Share of the token and of the vision budget that holds data, over all packs."""
    packs = sum(result["packs"] for result in results)
    tokens = sum(result["totals"]["tokens"] for result in results)
    patches = sum(result["totals"]["patches"] for result in results)
    return {
        "tokens": round(tokens / max(1, packs * budget.S), 6),
        "vision": round(patches / max(1, packs * budget.N * budget.L), 6),
    }


def _index_stats(units: Sequence[IndexedUnit]) -> dict[str, Any]:
    """Distributions per source, from the columns of the index."""
    names = list(dict.fromkeys(unit.source for unit in units))
    return {name: _source_stats([unit.path for unit in units if unit.source == name]) for name in names}


def _source_stats(paths: Sequence[Path]) -> dict[str, Any]:
    columns: dict[str, list[npt.NDArray[Any]]] = {}
    for path in paths:
        table = read_index(path)
        lists = table["segments"].combine_chunks()
        offsets, segments = lists.offsets.to_numpy(), lists.flatten()
        names = ("kind", "tokens", "height", "width", "t", "h", "w")
        field = {name: segments.field(name).to_numpy().astype(np.int64) for name in names}
        image = field["kind"] != TEXT
        text = np.concatenate([[0], np.cumsum(np.where(image, 0, field["tokens"]))])
        count = np.concatenate([[0], np.cumsum(image)])
        entries = {
            "text_tokens_per_sample": (text[offsets[1:]] - text[offsets[:-1]]),
            "images_per_sample": (count[offsets[1:]] - count[offsets[:-1]]),
            "image_height_pixels": field["height"][image],
            "image_width_pixels": field["width"][image],
            "image_aspect_ratio": (field["width"] / np.maximum(1, field["height"]))[image],
            "image_patches": (field["t"] * field["h"] * field["w"])[image],
        }
        for key, values in entries.items():
            columns.setdefault(key, []).append(values)
    return {key: _distribution(np.concatenate(values)) for key, values in columns.items()}


def _distribution(values: npt.NDArray[Any]) -> dict[str, float]:
    if not len(values):
        return {"count": 0}
    points = np.percentile(values, PERCENTILES)
    named = {
        f"p{percent}": round(float(point), 3) for percent, point in zip(PERCENTILES, points, strict=True)
    }
    return {"count": len(values), "mean": round(float(values.mean()), 3), **named}


def print_report(stats: Mapping[str, Any], console: Console) -> None:
    """The tables of the report, for people."""
    budget, fill = stats["budget"], stats["fill"]
    console.print(
        f"budget S = {budget['S']} tokens, N = {budget['N']} rows of L = {budget['L']} patches; "
        f"fill: tokens {fill['tokens']:.1%}, vision {fill['vision']:.1%}",
        soft_wrap=True,
    )
    splits = _table("split", "shards", "packs", "documents", "tokens", "labels", "images", "patches", "MB")
    for name, line in stats["splits"].items():
        counts = [
            line[key] for key in ("shards", "packs", "documents", "tokens", "labels", "images", "patches")
        ]
        splits.add_row(name, *(f"{count:,}" for count in counts), f"{line['bytes'] / 1e6:,.1f}")
    console.print(splits)
    account = _table("source", "read", "packed", "in parts", "rejected", "reasons")
    for name, line in stats["account"].items():
        lost = {
            **line["rejected"],
            **{f"part: {k}": v for k, v in line["parts"]["rejected"].items()},
            **{f"picture: {k}": v for k, v in line["media_dropped"].items()},
        }
        reasons = ", ".join(f"{reason} {count}" for reason, count in lost.items())
        rejected = sum(line["rejected"].values())
        numbers = [line["read"], line["packed"], line["split_parts"], rejected]
        account.add_row(name, *(f"{number:,}" for number in numbers), reasons or "-")
    console.print(account)
    samples = _table("source", "per sample or image", "mean", *(f"p{p}" for p in PERCENTILES))
    for name, lines in stats["samples"].items():
        for key, line in lines.items():
            if line["count"]:
                values = [line["mean"], *(line[f"p{percent}"] for percent in PERCENTILES)]
                samples.add_row(name, key.replace("_", " "), *(f"{value:,.4g}" for value in values))
    console.print(samples)


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for place, column in enumerate(columns):
        text = column in ("source", "split", "reasons", "per sample or image")
        table.add_column(column, justify="left" if text or place == 0 else "right")
    return table
