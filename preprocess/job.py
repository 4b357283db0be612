"""The job: scan -> plan -> pack -> dataset.json, on any executor, resuming by itself.

Every pass writes whole files under their final names and skips those that are there. What a pass depends on is
kept beside its output (`identity.json`); when that differs from this run's, the work is refused, or thrown
away with `on_change = "rebuild"`.
"""

from __future__ import annotations

import io
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console

from preprocess.account import SourceAccount, read_rejects, scan_rejects, settle
from preprocess.config import PreprocessConfig
from preprocess.executor import Executor, SerialExecutor
from preprocess.pack import PackTask, pack_shard
from preprocess.plan import PLAN_SUMMARY, IndexedUnit, make_plan, reject_table
from preprocess.progress import track
from preprocess.report.stats import collect_stats, fills, print_report
from preprocess.scan import ScanUnit, scan_unit
from preprocess.sources import list_units
from shared.config import to_dict, to_toml
from shared.dataset import MANIFEST, describe_contract, fingerprint_of
from shared.errors import UserError
from shared.files import atomic_path, read_json, remove_temporaries, write_json
from shared.tokens import TOKENIZER_FILES, TextTokenizer, load_tokenizer

# A rate over fewer samples says nothing: the ceiling is checked once this many have been read.
MIN_SAMPLES_FOR_REJECT_RATE = 20


@dataclass(frozen=True)
class Job:
    """One run's settings and places. Methods are the passes, each usable alone after the ones before it."""

    config: PreprocessConfig

    @cached_property
    def output(self) -> Path:
        return Path(self.config.output)

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        return load_tokenizer(Path(self.config.tokenizer), self.config.tokens)

    @cached_property
    def contract(self) -> dict[str, Any]:
        """What the fingerprint covers."""
        config = self.config
        return describe_contract(config.budget, config.geometry, self.tokenizer.ids, config.codec)

    @cached_property
    def units(self) -> list[IndexedUnit]:
        """Every raw file with the path of its index file."""
        return [
            IndexedUnit(name, unit, self.output / "index" / name / f"{number:06d}.parquet")
            for name, source in self.config.sources.items()
            for number, unit in enumerate(list_units(name, source))
        ]

    def prepare(self) -> None:
        """Check the settings against an earlier run in the same directory before any work is done.

        Raises:
            UserError: an input is missing, or the directory holds work of other settings.
        """
        config = to_dict(self.config)
        scan = {key: config[key] for key in ("sources", "geometry", "tokens", "limits")}
        scan["sources"] = {  # ceilings stop a job, they do not change what it writes
            name: {key: value for key, value in source.items() if key not in ("max_reject_rate", "too_long")}
            for name, source in scan["sources"].items()
        }
        scan["tokenizer_sha256"] = self.tokenizer.ids.tokenizer_sha256
        scan["inputs"] = [[unit.source, unit.unit, os.path.getsize(unit.unit)] for unit in self.units]
        rules = {name: source["too_long"] for name, source in config["sources"].items()}
        plan = {
            "scan": scan,
            "rules": rules,
            **{key: config[key] for key in ("budget", "plan", "cost", "seed", "codec")},
        }
        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"output {self.output}: cannot be made ({error.strerror}); choose another"
            ) from None
        remove_temporaries(self.output)
        self._claim("index", scan, ("index", "plan", "shards"))
        self._claim("plan", plan, ("plan", "shards"))
        with atomic_path(self.output / "config.toml") as temporary:
            temporary.write_text(to_toml(self.config), encoding="utf-8")

    def scan(self, executor: Executor) -> None:
        """Write the index file of every unit that has none."""
        tasks = [
            ScanUnit(
                source=unit.source,
                config=self.config.sources[unit.source],
                unit=unit.unit,
                output=unit.path,
                tokenizer=Path(self.config.tokenizer),
                tokens=self.config.tokens,
                geometry=self.config.geometry,
                limits=self.config.limits,
            )
            for unit in self.units
            if not unit.path.exists()
        ]
        _run(executor, scan_unit, tasks, label="scan", total=len(self.units))
        read, rejects = scan_rejects(self.units)
        for name in self.config.sources:
            reasons = [reject.reason for reject in rejects if reject.source == name]
            self._check_reject_rate(name, len(reasons), read.get(name, 0), reasons, "scan")
        if not any(read.values()):
            raise UserError(f"{self.config.output}: the sources hold no sample; check their paths")

    def plan(self) -> dict[str, Any]:
        """Write the plan, or return the one that is there."""
        summary = self.output / "plan" / PLAN_SUMMARY
        if not summary.exists():
            make_plan(
                self.units,
                self.config.sources,
                self.output / "plan",
                budget=self.config.budget,
                geometry=self.config.geometry,
                ids=self.tokenizer.ids,
                config=self.config.plan,
                seed=self.config.seed,
            )
        return read_json(summary)

    def pack(self, executor: Executor) -> None:
        """Write every shard that is not there."""
        shards = self.plan()["shards"]
        tasks = [
            PackTask(
                plan=self.output / "plan" / shard["name"],
                output=self.output / "shards" / shard["name"],
                result=self._result_path(shard["name"]),
                sources=self.config.sources,
                tokenizer=Path(self.config.tokenizer),
                tokens=self.config.tokens,
                budget=self.config.budget,
                geometry=self.config.geometry,
                cost=self.config.cost,
                fingerprint=fingerprint_of(self.contract),
            )
            for shard in shards
            if not (self.output / "shards" / shard["name"]).exists()
            or not self._result_path(shard["name"]).exists()
        ]
        _run(executor, pack_shard, tasks, label="pack", total=len(shards))

    def finish(self) -> dict[str, Any]:
        """Settle the account, write rejects, tokenizer, report and, last, dataset.json; return the statistics."""
        plan = self.plan()
        results = {shard["name"]: read_json(self._result_path(shard["name"])) for shard in plan["shards"]}
        read, early = scan_rejects(self.units)
        early += read_rejects(self.output / "plan" / "rejects.parquet")
        accounts, rejects = settle(
            list(self.config.sources), read, early, plan["sources"], list(results.values())
        )
        for name, account in accounts.items():
            self._check_account(name, account)
        with atomic_path(self.output / "rejects.parquet") as temporary:
            pq.write_table(reject_table(rejects), temporary)
        for name in TOKENIZER_FILES:
            with atomic_path(self.output / "tokenizer" / name) as temporary:
                shutil.copyfile(Path(self.config.tokenizer) / name, temporary)
        account = {name: line.as_dict() for name, line in accounts.items()}
        results = {name: result for name, result in results.items() if result["packs"]}
        stats = collect_stats(self.units, results, account, self.config.budget)
        self._write_report(stats)
        splits = {shard["name"]: shard["split"] for shard in plan["shards"]}
        shards = [
            {
                "name": name,
                "split": splits[name],
                **{key: result[key] for key in ("packs", "bytes", "checksum")},
            }
            for name, result in results.items()
        ]
        manifest = {
            **self.contract,
            "fingerprint": fingerprint_of(self.contract),
            "shards": shards,
            "totals": {
                key: sum(s[key] for s in stats["splits"].values())
                for key in ("packs", "bytes", "tokens", "labels", "patches", "images", "documents")
            },
            "fill": fills(results.values(), self.config.budget),
            "account": account,
            "made_by": _versions(),
        }
        write_json(self.output / MANIFEST, manifest)
        return stats

    def _write_report(self, stats: dict[str, Any]) -> None:
        write_json(self.output / "report" / "stats.json", stats)
        text = io.StringIO()
        print_report(stats, Console(file=text, width=120))
        with atomic_path(self.output / "report" / "report.txt") as temporary:
            temporary.write_text(text.getvalue(), encoding="utf-8")

    def _result_path(self, shard: str) -> Path:
        return self.output / "plan" / f"{shard.removesuffix('.parquet')}.result.json"

    def _claim(self, step: str, identity: dict[str, Any], stale: Sequence[str]) -> None:
        """Make the directory of a step this run's own."""
        if changed := self._changed(step, identity):
            if self.config.on_change == "refuse":
                raise UserError(
                    f"{self.output}: holds a run with other settings or inputs ({changed}); choose another output, "
                    f"or throw that work away with --on_change rebuild"
                )
            (self.output / MANIFEST).unlink(missing_ok=True)  # first: no data set without its shards
            for name in stale:
                shutil.rmtree(self.output / name, ignore_errors=True)
        write_json(self.output / step / "identity.json", identity)

    def _changed(self, step: str, identity: dict[str, Any]) -> str:
        """What differs from the run whose work lies in the directory of a step; "" when nothing does."""
        path = self.output / step / "identity.json"
        if path.exists():
            before = read_json(path)
            return _difference(before, identity) if before != identity else ""
        # Work that nobody claims: its removal was cut short.
        return f"{step}/identity.json is gone" if path.parent.is_dir() and any(path.parent.iterdir()) else ""

    def _check_account(self, name: str, account: SourceAccount) -> None:
        if fault := account.imbalance():
            raise RuntimeError(f"account of source {name!r} does not balance: {fault}")
        reasons = list(account.rejected.elements())
        self._check_reject_rate(name, account.num_rejected, account.read, reasons, "job")

    def _check_reject_rate(
        self, name: str, rejected: int, read: int, reasons: Sequence[str], step: str
    ) -> None:
        limit = self.config.sources[name].max_reject_rate
        if read < MIN_SAMPLES_FOR_REJECT_RATE or rejected <= limit * read:
            return
        counts = ", ".join(f"{reason} {reasons.count(reason)}" for reason in sorted(set(reasons)))
        raise UserError(
            f"source {name!r}: {rejected} of {read} samples rejected in the {step} ({counts}), above max_reject_rate "
            f"{limit}; look at the inputs, or raise sources.{name}.max_reject_rate"
        )


def run_job(config: PreprocessConfig) -> dict[str, Any]:
    """The whole job; returns the statistics of the finished data set."""
    job = Job(config)
    job.prepare()
    executor = make_executor(config)
    try:
        job.scan(executor)
        job.plan()
        job.pack(executor)
    finally:
        executor.close()
    return job.finish()


def make_executor(config: PreprocessConfig) -> Executor:
    if config.executor.kind == "serial":
        return SerialExecutor(config.executor.retries)
    from preprocess.ray_job import RayExecutor

    return RayExecutor(config.executor)


def _run(
    executor: Executor, function: Callable[[Any], int], tasks: Sequence[Any], *, label: str, total: int
) -> None:
    for _ in track(executor.map(function, tasks), label=label, total=total, done=total - len(tasks)):
        pass


def _difference(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> str:
    """The first key that differs, with both values when they are short."""
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            return _difference(old, new, f"{prefix}{key}.")
        short = f"{old!r}, now {new!r}"
        return f"{prefix}{key}: {short}" if len(short) < 120 else f"{prefix}{key}"
    return "nothing"


def _versions() -> dict[str, str]:
    names = ("parquetry", "pyarrow", "numpy", "torch", "pillow", "tokenizers")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
