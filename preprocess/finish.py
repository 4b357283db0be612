"""The end of a job: settle the account, then write rejects, tokenizer, report and, last, dataset.json."""

from __future__ import annotations

import io
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console

from preprocess.account import ScanCounts, SourceAccount, read_rejects, scan_counts, scan_rejects, settle
from preprocess.identity import made_by
from preprocess.index import IndexedUnit
from preprocess.report.stats import collect_stats, print_report
from preprocess.samples import Reject, reject_table
from preprocess.sources.base import SourceConfig
from shared.dataset import MANIFEST, fingerprint_of
from shared.errors import UserError
from shared.files import atomic_path, write_json
from shared.geometry import Budget
from shared.tokens import TOKENIZER_FILES

# A rate over fewer samples says nothing: the ceiling is checked once this many have been read.
MIN_SAMPLES_FOR_REJECT_RATE = 20


def finish(
    output: Path,
    *,
    units: Sequence[IndexedUnit],
    sources: Mapping[str, SourceConfig],
    plan: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
    contract: Mapping[str, Any],
    codec_settings: Mapping[str, int],
    tokenizer: Path,
) -> dict[str, Any]:
    """Complete the data set; return its statistics. `results` are the shards' result files by shard name.

    Raises:
        UserError: nothing was packed, or a source lost more samples than its ceiling allows.
        RuntimeError: the account does not balance, a defect of the program.
    """
    early = scan_rejects(units) + read_rejects(output / "plan" / "rejects.parquet")
    accounts, rejects = settle(
        list(sources), scan_counts(units), early, plan["sources"], list(results.values())
    )
    _check_accounts(accounts, sources)
    filled = {name: result for name, result in results.items() if result["packs"]}
    if not filled:
        reasons = ", ".join(sorted({reject.reason for reject in rejects}))
        raise UserError(
            f"{output}: no sample is left to pack, all were rejected ({reasons}); look at the inputs"
        )
    _write_side_files(output, rejects, tokenizer)
    account = {name: line.as_dict() for name, line in accounts.items()}
    stats = collect_stats(units, filled, account, Budget(**contract["budget"]))
    _write_report(output / "report", stats)
    write_json(output / MANIFEST, _manifest(contract, codec_settings, plan, filled, stats))
    return stats


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


def check_scan(counts: Mapping[str, ScanCounts], sources: Mapping[str, SourceConfig]) -> None:
    """Hold the ceilings against what the scan found, before the expensive pass."""
    for name, source in sources.items():
        line = counts.get(name, ScanCounts())
        check_reject_rate(name, line.rejected, line.read, source.max_reject_rate, "scan")
        media = line.media + line.media_dropped.total()
        check_reject_rate(name, line.media_dropped, media, source.max_reject_rate, "scan", "images")


def _check_accounts(accounts: Mapping[str, SourceAccount], sources: Mapping[str, SourceConfig]) -> None:
    for name, account in accounts.items():
        if fault := account.imbalance():
            raise RuntimeError(f"account of source {name!r} does not balance: {fault}")
        limit = sources[name].max_reject_rate
        check_reject_rate(name, account.losses, account.read, limit, "job")
        check_reject_rate(name, account.media_dropped, account.media_read, limit, "job", "images")


def _write_side_files(output: Path, rejects: Sequence[Reject], tokenizer: Path) -> None:
    with atomic_path(output / "rejects.parquet") as temporary:
        pq.write_table(reject_table(rejects), temporary)
    for name in TOKENIZER_FILES:
        with atomic_path(output / "tokenizer" / name) as temporary:
            shutil.copyfile(tokenizer / name, temporary)


def _write_report(directory: Path, stats: Mapping[str, Any]) -> None:
    write_json(directory / "stats.json", stats)
    text = io.StringIO()
    print_report(stats, Console(file=text, width=120))
    with atomic_path(directory / "report.txt") as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


def _manifest(
    contract: Mapping[str, Any],
    codec_settings: Mapping[str, int],
    plan: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
    stats: Mapping[str, Any],
) -> dict[str, Any]:
    """What dataset.json holds."""
    splits = {shard["name"]: shard["split"] for shard in plan["shards"]}
    shards = [
        {"name": name, "split": splits[name], **{key: result[key] for key in ("packs", "bytes", "checksum")}}
        for name, result in results.items()
    ]
    lines = list(stats["splits"].values())
    counted = ("packs", "bytes", "tokens", "labels", "patches", "images", "documents")
    return {
        **contract,
        "fingerprint": fingerprint_of(dict(contract)),
        # For people: a decoder needs none of it, so that data sets which differ here may be mixed.
        "codec_settings": dict(codec_settings),
        "shards": shards,
        "totals": {key: sum(line[key] for line in lines) for key in counted},
        "fill": stats["fill"],
        "account": stats["account"],
        "made_by": made_by(),
    }
