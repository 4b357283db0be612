"""The end of a job: settle the account, then write rejects, tokenizer, report and, last, dataset.json.

What there is one of per sample streams through; in memory stays what there is one of per shard.
"""

from __future__ import annotations

import io
import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from preprocess.account import ScanCounts, SourceAccount, scan_counts, settle
from preprocess.identity import made_by
from preprocess.index import IndexedUnit, mend_beside
from preprocess.plan import PlannedShard, planned_shards
from preprocess.report.stats import collect_stats, print_report
from preprocess.samples import OVER_MAX_IMAGES, REJECT_SCHEMA, Reject, reject_table
from preprocess.sources.base import SourceConfig
from shared.dataset import MANIFEST, fingerprint_of
from shared.errors import UserError
from shared.files import atomic_path, list_files, remove, write_json
from shared.geometry import Budget
from shared.remote import shown
from shared.tables import read_table
from shared.tokens import tokenizer_files

# A rate over fewer samples says nothing: the ceiling is checked once this many have been read.
MIN_SAMPLES_FOR_REJECT_RATE = 20
# Rows of rejects.parquet that are gathered before they are written.
ROWS_PER_GROUP = 1 << 16


def finish(
    output: Path,
    *,
    units: Sequence[IndexedUnit],
    sources: Mapping[str, SourceConfig],
    plan: Mapping[str, Any],
    read_result: Callable[[str], dict[str, Any]],
    contract: Mapping[str, Any],
    codec_settings: Mapping[str, int],
    tokenizer: Mapping[str, Path],
) -> dict[str, Any]:
    """Complete the data set; return its statistics.

    read_result: the result file of a shard, by its name. tokenizer: its files, by the names under which they are kept.

    Raises:
        UserError: nothing was packed, or a source lost more samples than its ceiling allows.
        RuntimeError: the account does not balance, a defect of the program.
    """
    shards: list[dict[str, Any]] = []
    rejecting: list[str] = []

    def results() -> Iterator[dict[str, Any]]:
        """The result of every shard, once; what is needed of it later is noted as it passes."""
        for shard in planned_shards(plan):
            result = read_result(shard.name)
            if result["packs"]:
                shards.append(_shard_line(shard, result))
            if result["rejects"]:
                rejecting.append(shard.name)
            yield result

    scanned = scan_counts(units)
    accounts = settle(list(sources), scanned, plan["sources"], results())
    _check_accounts(accounts, sources)
    if not shards:
        reasons = ", ".join(sorted({reason for account in accounts.values() for reason in account.rejected}))
        raise UserError(
            f"{output}: no sample is left to pack ({reasons}); look at the inputs and the mixture"
        )
    _write_rejects(output / "rejects.parquet", _reject_tables(output, scanned, map(read_result, rejecting)))
    _copy_tokenizer(tokenizer, output / "tokenizer")
    account = {name: line.as_dict() for name, line in accounts.items()}
    stats = collect_stats(shards, account, plan, Budget(**contract["budget"]))
    _write_report(output / "report", stats)
    unlearned = {name: line.unlearned_tokens for name, line in scanned.items()}
    write_json(output / MANIFEST, _manifest(contract, codec_settings, shards, stats, unlearned))
    return stats


def _shard_line(shard: PlannedShard, result: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a shard: its place in the manifest, and its totals."""
    kept = ("packs", "bytes", "checksum", "totals")
    return {"name": shard.name, "split": shard.split, **{key: result[key] for key in kept}}


def check_reject_rate(
    source: str, reasons: Counter[str], read: int, limit: float, step: str, what: str = "samples"
) -> None:
    """Stop a job that is eating its data.

    Raises:
        UserError: more than the share `limit` of the `read` samples (or images) was lost.
    """
    if read < MIN_SAMPLES_FOR_REJECT_RATE or reasons.total() <= limit * read:
        return
    counts = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
    raise UserError(
        f"source {source!r}: {reasons.total()} of {read} {what} rejected in the {step} ({counts}), above "
        f"max_reject_rate {limit}; look at the inputs, or raise sources.{source}.max_reject_rate"
    )


def check_damaged(source: str, counts: ScanCounts, limit: float) -> None:
    """Stop a job of which too many files are damaged: how many samples they held nobody knows.

    Raises:
        UserError: it is more than the share `limit` of them, however few there are.
    """
    if counts.damaged > limit * counts.units:
        raise UserError(
            f"source {source!r}: {counts.damaged} of {counts.units} files are lost in part or whole, above "
            f"max_reject_rate {limit} (the first: {counts.first_damaged}); mend them, take them out, or raise "
            f"sources.{source}.max_reject_rate"
        )


def check_any_left(source: str, reasons: Counter[str], left: int, step: str) -> None:
    """Stop a job that makes nothing of a source, whatever its ceiling.

    Raises:
        UserError: something was rejected and no sample is left.
    """
    if reasons.total() and not left:
        counts = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
        raise UserError(
            f"source {source!r}: no sample is left, all {reasons.total()} were rejected in the {step} ({counts}); "
            f"look at the inputs, or take the source out"
        )


def lost_media(dropped: Counter[str]) -> Counter[str]:
    """Pictures lost, without those that the config asks to leave out."""
    return Counter({reason: count for reason, count in dropped.items() if reason != OVER_MAX_IMAGES})


def check_scan(counts: Mapping[str, ScanCounts], sources: Mapping[str, SourceConfig]) -> None:
    """Hold the ceilings against what the scan found, before the expensive pass."""
    for name, source in sources.items():
        line = counts.get(name, ScanCounts())
        check_any_left(name, line.rejected, line.read - line.rejected.total(), "scan")
        check_damaged(name, line, source.max_reject_rate)
        check_reject_rate(name, line.rejected, line.read, source.max_reject_rate, "scan")
        lost = lost_media(line.media_dropped)
        media = line.media + lost.total()
        check_reject_rate(name, lost, media, source.max_reject_rate, "scan", "images")


def _check_accounts(accounts: Mapping[str, SourceAccount], sources: Mapping[str, SourceConfig]) -> None:
    for name, account in accounts.items():
        if fault := account.imbalance():
            raise RuntimeError(f"account of source {name!r} does not balance: {fault}")
        limit = sources[name].max_reject_rate
        check_any_left(name, account.losses, account.packed + account.split_parts, "job")
        check_reject_rate(name, account.losses, account.wanted, limit, "job")
        lost = lost_media(account.media_dropped)
        read = account.media_read - (account.media_dropped.total() - lost.total())
        check_reject_rate(name, lost, read, limit, "job", "images")


def _reject_tables(
    output: Path, scanned: Mapping[str, ScanCounts], results: Iterable[Mapping[str, Any]]
) -> Iterator[pa.Table]:
    """What scan, plan and pack rejected, in this order.

    Raises:
        UserError: a file of rejects is gone or damaged, or is not that of its index.
    """
    for path, rows in itertools.chain.from_iterable(line.reject_rows.items() for line in scanned.values()):
        mend = mend_beside(path.with_name(path.name.replace(".rejects", "")))
        table = read_table(path, mend=mend, schema=REJECT_SCHEMA)
        if len(table) != rows:
            raise UserError(f"{shown(path)}: has {len(table)} rows, not {rows}; {mend}")
        yield table
    for path in list_files(output / "plan", "*.rejects.parquet"):
        yield read_table(path, mend="delete plan/ and shards/ and run again", schema=REJECT_SCHEMA)
    for result in results:
        if rejects := result["rejects"]:
            rows = [{key: row[key] for key in REJECT_SCHEMA.names} for row in rejects]
            yield reject_table([Reject(**row) for row in rows])


def _write_rejects(path: Path, tables: Iterable[pa.Table]) -> None:
    """One file of all tables, row groups of about ROWS_PER_GROUP."""
    gathered: list[pa.Table] = []
    rows = 0
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(temporary, REJECT_SCHEMA, compression="zstd") as writer,
    ):
        for table in tables:
            gathered.append(table)
            rows += len(table)
            if rows >= ROWS_PER_GROUP:
                writer.write_table(pa.concat_tables(gathered))
                gathered, rows = [], 0
        writer.write_table(pa.concat_tables([REJECT_SCHEMA.empty_table(), *gathered]))


def _copy_tokenizer(files: Mapping[str, Path], target: Path) -> None:
    """These files and no others: a chat template of an earlier run would make it another tokenizer."""
    for name, file in files.items():
        with atomic_path(target / name) as temporary:
            shutil.copyfile(file, temporary)
    for name in set(tokenizer_files(target)) - set(files):
        remove(target / name)


def _write_report(directory: Path, stats: Mapping[str, Any]) -> None:
    write_json(directory / "stats.json", stats)
    text = io.StringIO()
    print_report(stats, Console(file=text, width=120))
    with atomic_path(directory / "report.txt") as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


def _manifest(
    contract: Mapping[str, Any],
    codec_settings: Mapping[str, int],
    shards: Sequence[Mapping[str, Any]],
    stats: Mapping[str, Any],
    unlearned_tokens: Mapping[str, int],
) -> dict[str, Any]:
    """What dataset.json holds."""
    lines = list(stats["splits"].values())
    counted = ("packs", "bytes", "tokens", "labels", "patches", "images", "documents")
    return {
        **contract,
        "fingerprint": fingerprint_of(dict(contract)),
        # For people: a decoder needs none of it, so that data sets which differ here may be mixed.
        "codec_settings": dict(codec_settings),
        "shards": [
            {key: shard[key] for key in ("name", "split", "packs", "bytes", "checksum")} for shard in shards
        ],
        "totals": {key: sum(line[key] for line in lines) for key in counted},
        "fill": stats["fill"],
        "account": stats["account"],
        # By source, of the text that the scan read: where there are none, every text token is a label.
        "unlearned_tokens": dict(unlearned_tokens),
        "mixture": stats["mixture"],
        "duplicates": stats["duplicates"],
        "made_by": made_by(),
    }
