"""The table of budgets: what each N and L fills and wastes, and why one of them was taken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Lines that a curve takes.
POINTS = 24


def budget_lines(record: Mapping[str, Any], explain: bool) -> list[str]:
    """`record` is plan/budget.json (`preprocess.plan.budget.Choice`). `explain` adds the curve of N * L and reasons."""
    chosen, curve = record["chosen"], record["curve"]
    lines = [
        f"S = {chosen['S']}, N = {chosen['N']}, L = {chosen['L']}: tokens {chosen['tokens']:.1%}, patches "
        f"{chosen['vision']:.1%} full, {chosen['waste']:.2%} of the useful FLOPs go to padding"
    ]
    if beside := record["beside"]:
        lines.append(
            f"the config's N = {beside['N']}, L = {beside['L']}: tokens {beside['tokens']:.1%}, patches "
            f"{beside['vision']:.1%} full, {beside['waste']:.2%} go to padding"
        )
    if not explain:
        return lines
    lines += [
        "",
        "the best L for each N",
        *_table(list(_best_of_each(curve, chosen, record["least_vision"])), chosen),
    ]
    same = [point for point in curve if point["N"] == chosen["N"]]
    lines += ["", f"N = {chosen['N']}", *_table(_thinned(same, chosen), chosen)]
    return [*lines, "", *_reasons(record)]


def _best_of_each(
    curve: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any], least_vision: float
) -> Iterator[Mapping[str, Any]]:
    for rows in sorted({point["N"] for point in curve}):
        own = [point for point in curve if point["N"] == rows]
        full = [point for point in own if point["vision"] >= least_vision] or own
        yield chosen if rows == chosen["N"] else min(full, key=lambda point: point["waste"])


def _thinned(points: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every so manyth point, and the chosen one."""
    step = -(-len(points) // POINTS)
    return [point for n, point in enumerate(points) if n % step == 0 or point["L"] == chosen["L"]]


def _table(points: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any]) -> Iterator[str]:
    yield "     N       L     N * L   tokens  patches  packs/bound  wasted FLOPs  rejected"
    for point in points:
        mark = "  <- chosen" if (point["N"], point["L"]) == (chosen["N"], chosen["L"]) else ""
        yield (
            f"{point['N']:6} {point['L']:7} {point['N'] * point['L']:9} {point['tokens']:8.2%} {point['vision']:8.2%} "
            f"{point['bound']:12.4f} {point['waste']:13.2%} {point['rejected']:9.3%}{mark}"
        )


def _reasons(record: Mapping[str, Any]) -> Iterator[str]:
    chosen = record["chosen"]
    yield (
        f"demand: {chosen['S']} tokens bring {record['demand']:,.0f} patches along; N * L lies "
        f"{chosen['N'] * chosen['L'] / max(1.0, record['demand']) - 1:+.1%} from that"
    )
    yield f"measured by packing up to {record['samples']:,} samples of the index as the plan packs them"
    yield (
        "wasted FLOPs: those of the linear layers over padding, and of rejected samples, per FLOP of the rest, for the "
        "model of [cost]"
    )
    yield (
        f"rows less than {record['least_vision']:.0%} full are taken only where none are fuller (budget.least_vision)"
    )
    if record["memory_bytes"] is not None:
        needed, there = record["memory_bytes"] / 1e9, record["gpu_bytes"] / 1e9
        verdict = "" if needed <= there else ": too much"
        yield f"memory: about {needed:.1f} GB of the GPU's {there:.1f}, by the model of [memory]{verdict}"
