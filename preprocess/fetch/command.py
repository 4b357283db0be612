"""`python -m preprocess fetch CONFIG.toml [--key value ...] [--json]`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preprocess.fetch.config import FetchConfig
from preprocess.fetch.job import run_fetch
from shared.config import load_config
from shared.errors import UserError


def main(words: Sequence[str], as_json: bool) -> int:
    """Fetch, and say what came of it."""
    if not words or words[0].startswith("--"):
        raise UserError("the first argument is the config, a TOML file; see configs/preprocess/fetch.toml")
    config = load_config(FetchConfig, Path(words[0]), words[1:])
    record = run_fetch(config)
    if as_json:
        print(json.dumps({"output": config.output, **record}))
        return _end(config, record)
    for name in ("rows", "images"):
        if name in record:
            print(_account_line(name, record[name]))
    if record["complete"]:
        print(f"{record['image_bytes'] / 1e6:,.1f} MB in {config.output}, failures in failures.parquet")
    else:
        print(f"slice {record['slice']} is done; {record['files_missing']} files of other slices are missing")
    return _end(config, record)


def _end(config: FetchConfig, record: dict[str, Any]) -> int:
    """0, unless nothing at all was fetched: that is no bad luck, whatever `max_failure_rate` allows."""
    account = record.get("images") or record["rows"]
    if not account["read"] or account["fetched"]:
        return 0
    reasons = ", ".join(f"{reason} {count}" for reason, count in account["failed"].items())
    raise UserError(
        f"{config.output}: nothing was fetched ({reasons}); correct [input] and look at failures.parquet"
    )


def _account_line(name: str, account: dict[str, Any]) -> str:
    failed = sum(account["failed"].values())
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in account["failed"].items())
    line = f"{name}: {account['read']:,} read = {account['fetched']:,} fetched + {failed:,} failed"
    return f"{line} ({reasons})" if reasons else line
