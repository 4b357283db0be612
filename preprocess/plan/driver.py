"""The process that plans: deals blocks, runs the tasks, sums up what they report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from preprocess.config import PlanConfig
from preprocess.index import IndexedUnit, read_counts
from preprocess.inputs import REQUESTS
from preprocess.plan.deal import Blocks, deal
from preprocess.plan.duplicates import DUPLICATE, dropped_bits, find_duplicates
from preprocess.plan.files import PLAN_SUMMARY, SPLITS, TRAIN, PlanSettings, PlanUnit, Run
from preprocess.plan.mixture import check_copies, mixture_record, source_repeats
from preprocess.plan.survey import BLOCK_DTYPE, Survey, run_survey, summarize
from preprocess.plan.window import WindowTask, plan_window
from preprocess.sources.base import SourceConfig
from shared.files import existing, read_json, write_json
from shared.geometry import Budget, Geometry
from shared.tokens import TokenIds


def make_plan(
    units: Sequence[IndexedUnit],
    sources: Mapping[str, SourceConfig],
    output: Path,
    *,
    budget: Budget,
    geometry: Geometry,
    ids: TokenIds,
    config: PlanConfig,
    seed: int,
    run: Run,
) -> dict[str, Any]:
    """Write the plan files and `plan.json`, the latter last; return what `plan.json` holds.

    Raises:
        UserError: the index is damaged, a source with a weight has nothing to train on, or one is used too often.
    """
    numbered, num_rows = _number(units)
    output = output.absolute()
    settings = PlanSettings(
        output=output,
        budget=budget,
        geometry=geometry,
        ids=ids,
        config=config,
        seed=seed,
        too_long={name: source.too_long for name, source in sources.items()},
        dropped=None,
    )
    duplicates: dict[str, dict[str, int]] | None = None
    if config.duplicates != "ignore":
        duplicates = find_duplicates(numbered, sources, settings, num_rows=num_rows, run=run)
    if config.duplicates == "drop":
        settings = replace(settings, dropped=dropped_bits(output))
    surveys = run_survey(numbered, settings, run)
    blocks, source_b = _blocks(surveys, numbered, list(sources))
    tokens = np.bincount(source_b, blocks["train_tokens"], len(sources)).astype(np.int64).tolist()
    available = dict(zip(sources, tokens, strict=True))
    repeats = source_repeats(sources, available, config.least_repeat)
    check_copies(repeats, source_b, blocks["train_tokens"], blocks["train_patches"], budget)
    tasks = [
        task for split in SPLITS for task in _windows(split, blocks, source_b, numbered, repeats, settings)
    ]
    done = existing(task.result for task in tasks)
    missing = [task for task in tasks if task.result not in done]
    run(plan_window, missing, label="plan", total=len(tasks))
    summary: dict[str, Any] = {
        "budget": asdict(budget),
        **_sum_up(tasks, sources, duplicates or {}),
        "duplicates": duplicates,
        "samples": summarize(surveys, sources),
    }
    summary["mixture"] = mixture_record(sources, repeats, available, summary.pop("tokens"))
    write_json(output / PLAN_SUMMARY, summary)
    return summary


def _number(units: Sequence[IndexedUnit]) -> tuple[list[PlanUnit], int]:
    """The units with the numbers of their first rows, and the number of all rows."""
    numbered: list[PlanUnit] = []
    row = 0
    with ThreadPoolExecutor(REQUESTS) as pool:
        footers = list(pool.map(read_counts, [unit.path for unit in units]))
    for unit, counts in zip(units, footers, strict=True):
        numbered.append(PlanUnit(unit.source, unit.unit, unit.path.absolute(), row))
        row += counts["samples"]
    return numbered, row


def _blocks(
    surveys: Sequence[Survey], units: Sequence[PlanUnit], sources: Sequence[str]
) -> tuple[npt.NDArray[np.void], npt.NDArray[np.int32]]:
    """BLOCK_DTYPE records of all units, and the number of the source of each."""
    blocks = np.concatenate([np.empty(0, BLOCK_DTYPE), *(survey.blocks for survey in surveys)])
    numbers = {name: number for number, name in enumerate(sources)}
    source_u = np.array([numbers[unit.source] for unit in units], np.int32)
    return blocks, source_u[blocks["unit"]]


def _windows(
    split: str,
    blocks: npt.NDArray[np.void],
    source_b: npt.NDArray[np.int32],
    units: Sequence[PlanUnit],
    repeats: Mapping[str, float],
    settings: PlanSettings,
) -> list[WindowTask]:
    """The windows of a split. Validation samples are used once, whatever the mixture."""
    used = dict(repeats) if split == TRAIN else dict.fromkeys(repeats, 1.0)
    columns = {name: blocks[name] for name in ("unit", "group", "begin", "rows")}
    rng = np.random.default_rng([settings.seed, xxhash.xxh3_64_intdigest(split.encode()) >> 32])
    slices = deal(
        Blocks(**columns, pieces=blocks[f"{split}_pieces"], source=source_b),
        np.array(list(used.values())),
        settings.config.window,
        rng,
    )
    tasks: list[WindowTask] = []
    for number, own in enumerate(np.split(slices, np.flatnonzero(np.diff(slices["window"])) + 1)):
        if len(own):
            members, own["unit"] = np.unique(own["unit"], return_inverse=True)
            chosen = tuple(units[unit] for unit in members.tolist())
            shares = {unit.source: used[unit.source] for unit in chosen}
            tasks.append(WindowTask(f"{split}-{number:06d}", split, chosen, own, shares, settings))
    return tasks


def _sum_up(
    tasks: Sequence[WindowTask],
    sources: Mapping[str, SourceConfig],
    duplicates: Mapping[str, Mapping[str, int]],
) -> dict[str, Any]:
    """`windows` and `sources` of plan.json, and the training tokens of each source."""
    kinds = ("whole", "split", "parts", "repeated", "media")
    counts = {name: Counter(dict.fromkeys(kinds, 0)) for name in sources}
    rejected: dict[str, Counter[str]] = {name: Counter() for name in sources}
    tokens = dict.fromkeys(sources, 0)
    windows: list[dict[str, Any]] = []
    for task in tasks:
        result = read_json(task.result, mend="delete plan/ and shards/ and run again")
        windows.append({"name": task.name, "split": task.split, "packs": result["packs"]})
        for name, line in result["sources"].items():
            counts[name].update({kind: line[kind] for kind in kinds})
            rejected[name].update(line["rejected"])
            tokens[name] += line["tokens"] if task.split == TRAIN else 0
    for name, found in duplicates.items():
        if found["dropped"]:
            rejected[name][DUPLICATE] = found["dropped"]
    lines = {name: {**counts[name], "rejected": dict(sorted(rejected[name].items()))} for name in sources}
    return {"windows": windows, "sources": lines, "tokens": tokens}
