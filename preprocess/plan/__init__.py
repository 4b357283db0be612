"""Plan: index -> which piece goes to which pack and vision row.

    index -> budget       what the config leaves open of S, N, L; before all else    (here)
          -> duplicates   content hashes compared over all sources, range by range         (tasks)
          -> survey       samples, pieces and tokens of every block of 1024 rows           (tasks)
          -> deal         blocks of all sources, mixed evenly, to windows                  (here)
          -> windows      samples -> pieces -> packs, shuffled -> shards                   (tasks)
          -> plan.json    what the windows made, written last

The process that plans holds a few numbers per block and per shard; everything per sample happens in tasks, which
know one window each. A window depends on seed, settings and index alone, so any number of workers gives the same
bytes, and windows that are there are kept.

    plan/budget.json                    the budget chosen and its curve; only if anything was to be chosen
    plan/train-000012.parquet           one row per piece (PLAN_SCHEMA), row group k is shard train-000012-00k
    plan/train-000012.rejects.parquet   what the window leaves out; only if any
    plan/train-000012.json              its shards and counts, last
"""

from preprocess.plan.budget import Choice, choose_budget
from preprocess.plan.driver import make_plan
from preprocess.plan.duplicates import DUPLICATE
from preprocess.plan.files import (
    BUDGET_CHOICE,
    PLAN_SCHEMA,
    PLAN_SUMMARY,
    PlannedShard,
    Run,
    planned_shards,
    read_shard_plan,
)
from preprocess.plan.window import LEFT_OUT

__all__ = [
    "BUDGET_CHOICE",
    "DUPLICATE",
    "LEFT_OUT",
    "PLAN_SCHEMA",
    "PLAN_SUMMARY",
    "Choice",
    "PlannedShard",
    "Run",
    "choose_budget",
    "make_plan",
    "planned_shards",
    "read_shard_plan",
]
