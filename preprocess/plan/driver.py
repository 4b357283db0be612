"""The process that plans: deals blocks, runs the tasks, sums up what they report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from preprocess.config import PlanConfig
from preprocess.index import IndexedUnit, read_counts
from preprocess.plan.deal import Blocks, deal
from preprocess.plan.duplicates import DUPLICATE, dropped_bits, find_duplicates
from preprocess.plan.files import PLAN_SUMMARY, SPLITS, TRAIN, PlanSettings, PlanUnit, Run
from preprocess.plan.mixture import mixture_record, source_repeats
from preprocess.plan.survey import SurveyTask, survey_unit
from preprocess.plan.window import WindowTask, plan_window
from preprocess.sources.base import SourceConfig
from shared.files import read_json, write_json
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
        UserError: the index is damaged, or a source with a weight has nothing to train on.
    """
    numbered, num_rows = _number(units)
    duplicates: dict[str, dict[str, int]] | None = None
    drop = config.duplicates == "drop"
    if config.duplicates != "ignore":
        duplicates = find_duplicates(
            numbered,
            output.absolute(),
            num_rows=num_rows,
            drop=drop,
            validation_fraction=config.validation_fraction,
            run=run,
        )
    settings = PlanSettings(
        output=output.absolute(),
        budget=budget,
        geometry=geometry,
        ids=ids,
        config=config,
        seed=seed,
        too_long={name: source.too_long for name, source in sources.items()},
        dropped=dropped_bits(output.absolute()) if drop else None,
    )
    blocks = _survey(numbered, settings, run)
    names = list(sources)
    source_b = np.array([names.index(unit.source) for unit in numbered], np.int32)[blocks["unit"]]
    tokens = np.bincount(source_b, blocks["train_tokens"], len(names)).astype(np.int64).tolist()
    available = dict(zip(names, tokens, strict=True))
    repeats = source_repeats(sources, available, config.least_repeat)
    tasks = [
        task for split in SPLITS for task in _windows(split, blocks, source_b, numbered, repeats, settings)
    ]
    missing = [task for task in tasks if not task.result.exists()]
    run(plan_window, missing, label="plan", total=len(tasks))
    summary = _sum_up(tasks, sources, repeats, available, duplicates)
    write_json(output / PLAN_SUMMARY, summary)
    return summary


def _number(units: Sequence[IndexedUnit]) -> tuple[list[PlanUnit], int]:
    """The units with the numbers of their first rows, and the number of all rows."""
    numbered: list[PlanUnit] = []
    row = 0
    for unit in units:
        numbered.append(PlanUnit(unit.source, unit.unit, unit.path.absolute(), row))
        row += read_counts(unit.path)["samples"]
    return numbered, row


def _survey(units: Sequence[PlanUnit], settings: PlanSettings, run: Run) -> npt.NDArray[np.void]:
    """BLOCK_DTYPE records of all units, in their order."""
    tasks = [SurveyTask(number, unit, settings) for number, unit in enumerate(units)]
    found = run(survey_unit, tasks, label="survey", total=len(tasks))
    return np.sort(np.concatenate(found), order=["unit", "group"])


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
    repeats: Mapping[str, float],
    available: Mapping[str, int],
    duplicates: Mapping[str, Mapping[str, int]] | None,
) -> dict[str, Any]:
    """What plan.json holds, from the results of the windows."""
    kinds = ("whole", "split", "parts", "repeated", "media")
    counts: dict[str, Counter[str]] = {name: Counter() for name in sources}
    rejected: dict[str, Counter[str]] = {name: Counter() for name in sources}
    tokens = Counter(dict.fromkeys(sources, 0))
    shards: list[dict[str, Any]] = []
    for task in tasks:
        result = read_json(task.result, mend="delete the plan/ directory and run again")
        place = {"split": task.split, "plan": f"{task.name}.parquet"}
        shards += [{**shard, **place, "row_group": number} for number, shard in enumerate(result["shards"])]
        for name, line in result["sources"].items():
            counts[name].update({kind: line[kind] for kind in kinds})
            rejected[name].update(line["rejected"])
            tokens[name] += line["tokens"] if task.split == TRAIN else 0
    for name, found in (duplicates or {}).items():
        if found["dropped"]:
            rejected[name][DUPLICATE] = found["dropped"]
    return {
        "shards": shards,
        "sources": {
            name: {
                **{kind: counts[name][kind] for kind in kinds},
                "rejected": dict(sorted(rejected[name].items())),
            }
            for name in sources
        },
        "mixture": mixture_record(sources, repeats, available, tokens),
        "duplicates": None if duplicates is None else dict(duplicates),
    }
