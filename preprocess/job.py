"""The job: scan -> plan -> pack -> dataset.json, on any executor, resuming by itself.

Every pass writes whole files under their final names and skips those that are there. What a pass depends on is
kept beside its output (`preprocess.identity`), so that nothing of another run is taken for this one's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from preprocess.account import scan_counts
from preprocess.budgets import AUTO
from preprocess.config import PreprocessConfig
from preprocess.executor import Executor, SerialExecutor
from preprocess.faults import Limits
from preprocess.finish import check_scan, finish
from preprocess.identity import claim, plan_identity, require_same, scan_identity, short_hash
from preprocess.index import IndexedUnit, check_stores
from preprocess.pack import PackTask, pack_shard
from preprocess.plan import (
    BUDGET_CHOICE,
    PLAN_SUMMARY,
    Choice,
    PlannedShard,
    choose_budget,
    make_plan,
    planned_shards,
)
from preprocess.progress import track, working
from preprocess.scan import ScanUnit, scan_unit
from preprocess.sources import open_source
from preprocess.sources.base import SourceContext
from preprocess.tokenizer_copy import TokenizerFiles, copy_tokenizer, find_tokenizer, scan_with_copy
from shared.codecs import require_libraries
from shared.config import to_toml
from shared.dataset import MANIFEST, describe_contract, fingerprint_of
from shared.errors import UserError
from shared.files import (
    atomic_path,
    existing,
    exists,
    file_size,
    lock_directory,
    read_json,
    remove_temporaries,
    write_json,
)
from shared.geometry import Budget
from shared.remote import as_path, is_remote, shown
from shared.tokens import TextTokenizer, kept_files, load_tokenizer, tokenizer_hash

# What a job writes below its output: nothing else there is ever touched.
DIRECTORIES = ("index", "plan", "shards", "tokenizer", "report")
FILES = (MANIFEST, "config.toml", "rejects.parquet")
CHOOSING = "choosing the budget: a sample of the index is packed at many N and L"
# A task's share of the token files that are read once, for their checksums, before anything is packed from them.
UNITS_PER_CHECK = 64


@dataclass(frozen=True)
class Job:
    """One run's settings and places. Methods are the passes, each usable alone after the ones before it."""

    config: PreprocessConfig

    @cached_property
    def output(self) -> Path:
        return as_path(self.config.output)

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """Its hash covers the templates that sources name, as they are part of it in the data set."""
        directory = self.tokenizer_directory
        try:
            found = load_tokenizer(directory, self.config.tokens)
        except UserError as error:
            # A copy's own name says nothing.
            raise UserError(str(error).replace(str(directory), shown(self.config.tokenizer))) from None
        sha256 = tokenizer_hash(directory, self._source_files)
        return replace(found, ids=replace(found.ids, tokenizer_sha256=sha256))

    @cached_property
    def tokenizer_directory(self) -> Path:
        """On this machine: the config's, or a copy of it."""
        if self._tokenizer_files is not None:
            return copy_tokenizer(self._tokenizer_files)
        return Path(self.config.tokenizer).absolute()

    @cached_property
    def _tokenizer_files(self) -> TokenizerFiles | None:
        """What workers copy of a tokenizer that lies in a store."""
        if not is_remote(self.config.tokenizer):
            return None
        named = [file for source in self.config.sources.values() for file in source.files(Path())]
        return find_tokenizer(self.config.tokenizer, [str(file) for file in named if not file.is_absolute()])

    @property
    def _source_files(self) -> dict[str, list[Path]]:
        """Files that decide how a source is read, such as its chat template."""
        directory = self.tokenizer_directory
        return {name: source.files(directory) for name, source in self.config.sources.items()}

    @cached_property
    def budget(self) -> Budget:
        """Given, or chosen by the lengths that the scan found and kept for good before anything is planned."""
        if (fixed := self.config.budget.fixed) is not None:
            return fixed
        path, choice = self.output / "plan" / BUDGET_CHOICE, self.budget_choice()
        try:
            budget = Budget(**choice["budget"])
            self.config.budget_limits.check(budget.S, budget.N, budget.L)
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(
                f"{path}: holds no budget of this config ({error}); delete plan/ and shards/ and run again"
            ) from None
        return budget

    def budget_choice(self) -> dict[str, Any]:
        """What plan/budget.json holds, measured if need be.

        Raises:
            UserError: the config leaves nothing to choose, or something is not scanned.
        """
        if self.config.budget.fixed is not None:
            raise UserError(
                'budget: S, N and L are given, nothing was chosen; --what-if shows other N and L, "auto" takes them'
            )
        path = self.output / "plan" / BUDGET_CHOICE
        if not exists(path):
            self.require_index()
            with working(CHOOSING):
                choice = choose_budget(self.units, self.config, self.tokenizer.ids)
            write_json(path, choice.record)
        return read_json(path)

    def what_if(self) -> Choice:
        """What N and L would be chosen, and what the config's own do; reads the index and writes nothing.

        Raises:
            UserError: something is not scanned, or with other settings.
        """
        require_same(self.output, "index", self.identity["scan"])
        self.require_index()
        config = self.config
        free = replace(config, budget=replace(config.budget, N=AUTO, L=AUTO))
        with working(CHOOSING):
            return choose_budget(self.units, free, self.tokenizer.ids, beside=config.budget.fixed)

    def require_index(self) -> None:
        """Raises UserError: an input is not scanned."""
        missing = len(self.units) - len(existing(unit.path for unit in self.units))
        if missing:
            raise UserError(
                f"{self.output}: {missing} of {len(self.units)} inputs are not scanned; run `scan` first"
            )

    @cached_property
    def contract(self) -> dict[str, Any]:
        """What the fingerprint covers."""
        config = self.config
        return describe_contract(self.budget, config.geometry, self.tokenizer.ids, config.codec)

    @cached_property
    def units(self) -> list[IndexedUnit]:
        """Every raw file with the path of its index file."""
        return [
            IndexedUnit(name, unit, self.output / "index" / name / f"{number:06d}.parquet")
            for name, source in self.config.sources.items()
            for number, unit in enumerate(open_source(source, self._context(name)).units())
        ]

    def _context(self, name: str) -> SourceContext:
        return SourceContext(name, self.tokenizer_directory, self.config.tokens)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that the shards depend on; its part `scan` is all that the index depends on."""
        scan = scan_identity(self.config, self.units, self.tokenizer.ids.tokenizer_sha256)
        return plan_identity(self.config, scan)

    @cached_property
    def identity_hash(self) -> str:
        """What every result file carries: hashed once, as it names all inputs."""
        return short_hash({**self.identity, "chosen": asdict(self.budget)})

    def prepare(self, identity: dict[str, Any]) -> None:
        """Check the settings against an earlier run in the same directory before any work is done.

        Raises:
            UserError: the directory holds work of other settings.
        """
        for name in DIRECTORIES:
            remove_temporaries(self.output / name)
        for name in FILES:
            remove_temporaries(self.output, f"{name}.*")
        scan, on_change = identity["scan"], self.config.on_change
        claim(self.output, "index", scan, stale=("shards", "plan", "index"), on_change=on_change)
        claim(self.output, "plan", identity, stale=("shards", "plan"), on_change=on_change)
        with atomic_path(self.output / "config.toml") as temporary:
            temporary.write_text(to_toml(self.config), encoding="utf-8")

    def scan(self, executor: Executor) -> None:
        """Write the index file of every unit that has none."""
        done = existing(unit.path for unit in self.units)
        # A task reads its unit: the other paths, maybe 100,000, stay here. Equal settings share one reader in a worker.
        sources = {
            name: replace(source, paths=source.paths[:1]) for name, source in self.config.sources.items()
        }
        tasks = [
            ScanUnit(
                source=unit.source,
                config=sources[unit.source],
                # A worker has a directory of its own.
                unit=unit.unit if is_remote(unit.unit) else os.path.abspath(unit.unit),
                output=unit.path.absolute(),
                tokenizer=self.tokenizer_directory,
                tokens=self.config.tokens,
                geometry=self.config.geometry,
                limits=self.config.limits,
                video=self.config.video,
                hash_content=self.config.plan.duplicates != "ignore",
            )
            for unit in self.units
            if unit.path not in done
        ]
        files = self._tokenizer_files
        _run(
            executor,
            scan_unit if files is None else partial(scan_with_copy, files),
            tasks,
            label="scan",
            total=len(self.units),
        )
        counts = scan_counts(self.units)
        check_scan(counts, self.config.sources)
        if not any(line.read for line in counts.values()):
            raise UserError(f"{self.config.output}: the sources hold no sample; check their paths")

    def plan(self, executor: Executor) -> dict[str, Any]:
        """Write the plan, or return the one that is there.

        Raises:
            UserError: the one that is there is for another budget than plan/budget.json.
        """
        summary = self.output / "plan" / PLAN_SUMMARY
        if not exists(summary):
            make_plan(
                self.units,
                self.config.sources,
                self.output / "plan",
                budget=self.budget,
                geometry=self.config.geometry,
                ids=self.tokenizer.ids,
                config=self.config.plan,
                seed=self.config.seed,
                run=partial(_run, executor),
            )
        plan = read_json(summary)
        if plan.get("budget") != asdict(self.budget):
            raise UserError(
                f"{summary}: planned for {plan.get('budget')}, not for {self.budget}; delete plan/ and shards/ and "
                "run again"
            )
        return plan

    def pack(self, executor: Executor) -> None:
        """Write every shard that is not there, or not whole, or of another plan."""
        plan = self.plan(executor)
        tasks = [self._pack_task(shard) for shard in planned_shards(plan) if not self._is_packed(shard.name)]
        if tasks:
            indexes = [unit.path.absolute() for unit in self.units]
            groups = [indexes[n : n + UNITS_PER_CHECK] for n in range(0, len(indexes), UNITS_PER_CHECK)]
            _run(executor, check_stores, groups, label="check", total=len(groups))
        total = sum(len(window["packs"]) for window in plan["windows"])
        _run(executor, pack_shard, tasks, label="pack", total=total)

    def _pack_task(self, shard: PlannedShard) -> PackTask:
        return PackTask(
            plan=(self.output / "plan" / shard.plan).absolute(),
            row_group=shard.row_group,
            output=(self.output / "shards" / shard.name).absolute(),
            result=self._result_path(shard.name).absolute(),
            index=(self.output / "index").absolute(),
            bad_media={name: source.bad_media for name, source in self.config.sources.items()},
            ids=self.tokenizer.ids,
            budget=self.budget,
            geometry=self.config.geometry,
            limits=self.config.limits,
            images=self.config.images,
            video=self.config.video,
            cost=self.config.cost,
            fingerprint=fingerprint_of(self.contract),
            codec=self.config.codec,
            codec_settings={"jpeg_quality": self.config.jpeg_quality, "zstd_level": self.config.zstd_level},
            directory=os.getcwd(),
            identity=self.identity_hash,
        )

    def _is_packed(self, name: str) -> bool:
        shard, result = self.output / "shards" / name, self._result_path(name)
        size = file_size(shard)
        if size is None or not exists(result):
            return False
        made = read_json(result)
        return made["identity"] == self.identity_hash and made["bytes"] == size

    def finish(self) -> dict[str, Any]:
        """Settle the account and write what makes a data set of the shards; return the statistics.

        Raises:
            UserError: a shard is not the one that this plan made.
        """
        plan = read_json(self.output / "plan" / PLAN_SUMMARY, mend="run `plan` and `pack` first")
        for shard in planned_shards(plan):
            if not self._is_packed(shard.name):
                raise UserError(
                    f"{self.output}: {shard.name} is missing or was written by another run meanwhile; end that "
                    f"run and give the same command again"
                )
        return finish(
            self.output,
            units=self.units,
            sources=self.config.sources,
            plan=plan,
            read_result=lambda shard: read_json(self._result_path(shard)),
            contract=self.contract,
            codec_settings=self.identity["codec_settings"],
            tokenizer=kept_files(self.tokenizer_directory, self._source_files),
        )

    def _result_path(self, shard: str) -> Path:
        return self.output / "plan" / f"{shard.removesuffix('.parquet')}.result.json"


@contextmanager
def open_job(config: PreprocessConfig) -> Generator[Job, None, None]:
    """The job of a config, ready for its passes, its output directory held by this process alone."""
    job = Job(config)
    # This reads tokenizer and inputs: what is wrong with them ends here, before anything is made.
    require_libraries(config.codec)
    identity = job.identity
    with lock_directory(job.output, "preprocessing"):
        job.prepare(identity)
        yield job


def run_job(config: PreprocessConfig) -> dict[str, Any]:
    """The whole job; returns the statistics of the finished data set."""
    with open_job(config) as job:
        with open_executor(config) as executor:
            job.scan(executor)
            job.plan(executor)
            job.pack(executor)
        return job.finish()


@contextmanager
def open_executor(config: PreprocessConfig) -> Generator[Executor, None, None]:
    executor = make_executor(config)
    try:
        yield executor
    finally:
        executor.close()


def make_executor(config: PreprocessConfig) -> Executor:
    if config.executor == "serial":
        return SerialExecutor(config.retries)
    from preprocess.ray_job import RayExecutor

    return RayExecutor(
        config.ray, config.retries, Limits(config.limits.max_seconds, config.limits.max_memory)
    )


def _run(
    executor: Executor, function: Callable[[Any], Any], tasks: Sequence[Any], *, label: str, total: int
) -> list[Any]:
    """Results in order of completion."""
    results = executor.map(function, tasks)
    try:
        return list(track(results, label=label, total=total, done=total - len(tasks)))
    except OSError as error:  # after all retries
        raise UserError(
            f"{label}: {error.filename or 'a file'}: {error.strerror or error}; when that is mended, the same "
            f"command goes on where it stopped"
        ) from None
    except MemoryError:
        raise UserError(
            f"{label}: out of memory; give it fewer workers (--ray.workers) or more memory, the same command goes on"
        ) from None
