"""The account: every sample read is packed, packed in parts, or rejected with a reason. To the unit.

    samples   read = packed + split_parts + sum(rejected)
    parts     made = packed + sum(rejected)            of the samples that were cut

A cut sample counts as `split_parts` when at least one of its parts is trained on; its other parts, if any
failed, are counted in `parts.rejected`. A sample of which nothing is trained on is rejected. A picture that is
dropped from a sample that lives on is counted in `media_dropped`. The two sides come from different files (read:
index; packed: shards), so a lost sample shows.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preprocess.index import IndexedUnit, read_counts, read_unit_rejects
from preprocess.samples import Reject
from shared.tables import read_table


@dataclass(slots=True)
class SourceAccount:
    """One source's line of the account."""

    read: int = 0
    packed: int = 0
    split_parts: int = 0
    rejected: Counter[str] = field(default_factory=Counter[str])
    parts_made: int = 0
    parts_packed: int = 0
    parts_rejected: Counter[str] = field(default_factory=Counter[str])
    # Samples of `split_parts` that lost one of their parts.
    incomplete: Counter[str] = field(default_factory=Counter[str])
    # Pictures and videos of the samples that are trained on: seen by the scan, and lost from them.
    media_read: int = 0
    media_dropped: Counter[str] = field(default_factory=Counter[str])

    @property
    def num_rejected(self) -> int:
        return sum(self.rejected.values())

    @property
    def losses(self) -> Counter[str]:
        """Samples that are rejected or lost a part, by reason: what the ceiling counts."""
        return self.rejected + self.incomplete

    def imbalance(self) -> str | None:
        """None when both equations hold, else the one that does not."""
        if self.read != self.packed + self.split_parts + self.num_rejected:
            return f"read {self.read} != packed {self.packed} + split {self.split_parts} + rejected {self.num_rejected}"
        lost = sum(self.parts_rejected.values())
        if self.parts_made != self.parts_packed + lost:
            return f"parts made {self.parts_made} != packed {self.parts_packed} + rejected {lost}"
        return None

    def as_dict(self) -> dict[str, Any]:
        return {
            "read": self.read,
            "packed": self.packed,
            "split_parts": self.split_parts,
            "rejected": dict(sorted(self.rejected.items())),
            "parts": {
                "made": self.parts_made,
                "packed": self.parts_packed,
                "rejected": dict(sorted(self.parts_rejected.items())),
                "incomplete_samples": dict(sorted(self.incomplete.items())),
            },
            "media_dropped": dict(sorted(self.media_dropped.items())),
        }


@dataclass(slots=True)
class ScanCounts:
    """What the scan counted of one source."""

    read: int = 0
    media: int = 0
    rejected: Counter[str] = field(default_factory=Counter[str])
    media_dropped: Counter[str] = field(default_factory=Counter[str])


def scan_counts(units: Sequence[IndexedUnit]) -> dict[str, ScanCounts]:
    """Counts of every source, from the footers of its index files."""
    counts: dict[str, ScanCounts] = {}
    for unit in units:
        found, line = read_counts(unit.path), counts.setdefault(unit.source, ScanCounts())
        line.read += found["read"]
        line.media += found["media"]
        line.rejected.update(found["rejected"])
        line.media_dropped.update(found["media_dropped"])
    return counts


def scan_rejects(units: Sequence[IndexedUnit]) -> list[Reject]:
    """What the scan rejected, samples and pictures."""
    return [reject for unit in units for reject in read_unit_rejects(unit)]


def read_rejects(path: Path) -> list[Reject]:
    table = read_table(path, mend="delete the plan/ directory beside it and run again")
    return [Reject(**row) for row in table.to_pylist()]


def settle(
    sources: Sequence[str],
    scanned: Mapping[str, ScanCounts],
    early_rejects: Sequence[Reject],
    planned: Mapping[str, Mapping[str, int]],
    results: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, SourceAccount], list[Reject]]:
    """Account of every source, and all rejects.

    early_rejects: of scan and plan. planned: `sources` of plan.json. results: the shards' result files.
    """
    accounts = {name: SourceAccount() for name in sources}
    for name, counts in scanned.items():
        accounts[name].read, accounts[name].media_read = (
            counts.read,
            counts.media + counts.media_dropped.total(),
        )
    rejects = list(early_rejects)
    for reject in early_rejects:
        account = accounts[reject.source]
        (account.rejected if reject.media < 0 else account.media_dropped)[reject.reason] += 1
    failed_parts: defaultdict[tuple[str, str, str], list[tuple[str, int]]] = defaultdict(list)
    for result in results:
        for name, counts in result["packed"].items():
            accounts[name].packed += counts["whole"]
            accounts[name].parts_packed += counts["parts"]
        for row in result["rejects"]:
            fields = {key: row[key] for key in ("source", "key", "reason", "detail", "part", "media")}
            rejects.append(Reject(**fields))
            if row["media"] >= 0:
                accounts[row["source"]].media_dropped[row["reason"]] += 1
            elif row["parts"] == 1:
                accounts[row["source"]].rejected[row["reason"]] += 1
            else:
                accounts[row["source"]].parts_rejected[row["reason"]] += 1
                failed_parts[row["source"], row["unit"], row["key"]].append((row["reason"], row["parts"]))
    for name, account in accounts.items():
        account.parts_made = planned[name]["parts"]
        account.split_parts = planned[name]["split"]
    for (name, _, _), failures in failed_parts.items():
        if len(failures) == failures[0][1]:  # every part failed: nothing of the sample is left
            accounts[name].split_parts -= 1
            accounts[name].rejected[failures[0][0]] += 1
        else:
            accounts[name].incomplete[failures[0][0]] += 1
    return accounts, rejects
