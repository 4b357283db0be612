"""`report/stats.json` and the table a person reads, from what plan and pack counted, never from raw inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from shared.geometry import Budget

PERCENTILES = (5, 50, 95, 100)


def collect_stats(
    shards: Sequence[Mapping[str, Any]],
    account: Mapping[str, Any],
    plan: Mapping[str, Any],
    budget: Budget,
) -> dict[str, Any]:
    """Everything the report shows. `shards` have split, packs, bytes and totals."""
    splits: dict[str, dict[str, int]] = {}
    for shard in shards:
        line = splits.setdefault(shard["split"], {"shards": 0, "packs": 0, "bytes": 0})
        counts = {"shards": 1, "packs": shard["packs"], "bytes": shard["bytes"], **shard["totals"]}
        for key, value in counts.items():
            line[key] = line.get(key, 0) + value
    return {
        "budget": {"S": budget.S, "N": budget.N, "L": budget.L},
        "fill": fills(shards, budget),
        "splits": splits,
        "account": dict(account),
        "mixture": plan["mixture"],
        "duplicates": plan["duplicates"],
        "samples": plan["samples"],
    }


def fills(shards: Sequence[Mapping[str, Any]], budget: Budget) -> dict[str, float]:
    """Share of the token and of the vision budget that holds data, over all packs."""
    packs = sum(shard["packs"] for shard in shards)
    tokens = sum(shard["totals"]["tokens"] for shard in shards)
    patches = sum(shard["totals"]["patches"] for shard in shards)
    return {
        "tokens": round(tokens / max(1, packs * budget.S), 6),
        "vision": round(patches / max(1, packs * budget.N * budget.L), 6),
    }


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
    account = _table("source", "read", "repeated", "packed", "in parts", "rejected", "reasons")
    for name, line in stats["account"].items():
        lost = {
            **line["rejected"],
            **{f"part: {k}": v for k, v in line["parts"]["rejected"].items()},
            **{f"picture: {k}": v for k, v in line["media_dropped"].items()},
        }
        reasons = ", ".join(f"{reason} {count}" for reason, count in lost.items())
        rejected = sum(line["rejected"].values())
        numbers = [line["read"], line["repeated"], line["packed"], line["split_parts"], rejected]
        account.add_row(name, *(f"{number:,}" for number in numbers), reasons or "-")
    console.print(account)
    _print_mixture(stats, console)
    samples = _table("source", "per sample or image", "mean", *(f"p{p}" for p in PERCENTILES))
    for name, lines in stats["samples"].items():
        for key, line in lines.items():
            if line["count"]:
                values = [line["mean"], *(line[f"p{percent}"] for percent in PERCENTILES)]
                samples.add_row(name, key.replace("_", " "), *(f"{value:,.4g}" for value in values))
    console.print(samples)


def _print_mixture(stats: Mapping[str, Any], console: Console) -> None:
    """The mixture where one was asked for, and duplicates where there are any."""
    mixture = _table("source", "weight", "repeat", "train tokens", "share asked", "share")
    for name, line in stats["mixture"].items():
        shares = (f"{line[key]:.2%}" for key in ("share_asked", "share"))
        mixture.add_row(name, f"{line['weight']:g}", f"{line['repeat']:.4g}", f"{line['tokens']:,}", *shares)
    if any(line["repeat"] != 1 for line in stats["mixture"].values()):
        console.print(mixture)
    for name, line in (stats["duplicates"] or {}).items():
        console.print(
            f"{name}: {line['found']:,} samples are the same as an earlier one, {line['across_splits']:,} of them in "
            f"the other split; " + ("left out" if line["dropped"] else "kept"),
            soft_wrap=True,
        )


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for place, column in enumerate(columns):
        text = column in ("source", "split", "reasons", "per sample or image")
        table.add_column(column, justify="left" if text or place == 0 else "right")
    return table
