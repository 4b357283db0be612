"""The account: every sample read is packed, packed in parts, or rejected with a reason. To the unit.

    samples   read + repeated = packed + split_parts + sum(rejected)
    parts     made = packed + sum(rejected)            of the samples that were cut

`repeated` are further uses of samples that a mixture takes more than once: each counts as a sample of its own. What a
mixture leaves out, and a dropped duplicate, is rejected with its reason, and no loss (`DELIBERATE`).

A cut sample counts as `split_parts` when at least one of its parts is trained on; its other parts, if any
failed, are counted in `parts.rejected`. A sample of which nothing is trained on is rejected. A picture that is
dropped from a sample that lives on is counted in `media_dropped`. The two sides come from different files (read:
index; packed: shards), so a lost sample shows.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preprocess.index import IndexedUnit, read_counts
from preprocess.inputs import REQUESTS
from preprocess.plan import DUPLICATE, LEFT_OUT
from preprocess.samples import NO_LABELS

# Reasons that the config asks for.
DELIBERATE = (DUPLICATE, LEFT_OUT)


@dataclass(slots=True)
class SourceAccount:
    """One source's line of the account."""

    read: int = 0
    repeated: int = 0
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
        """Samples that are rejected or lost a part, by reason: what the ceiling counts. Labels are what can be lost."""
        losses = self.rejected + self.incomplete
        for reason in (*DELIBERATE, NO_LABELS):
            del losses[reason]
        return losses

    @property
    def wanted(self) -> int:
        """Uses of samples that were to be trained on: what the ceiling is a share of."""
        return self.read + self.repeated - sum(self.rejected[reason] for reason in DELIBERATE)

    def imbalance(self) -> str | None:
        """None when both equations hold, else the one that does not."""
        if self.read + self.repeated != self.packed + self.split_parts + self.num_rejected:
            return (
                f"read {self.read} + repeated {self.repeated} != packed {self.packed} + split {self.split_parts} + "
                f"rejected {self.num_rejected}"
            )
        lost = sum(self.parts_rejected.values())
        if self.parts_made != self.parts_packed + lost:
            return f"parts made {self.parts_made} != packed {self.parts_packed} + rejected {lost}"
        return None

    def as_dict(self) -> dict[str, Any]:
        return {
            "read": self.read,
            "repeated": self.repeated,
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
    # Tokens of text of which the source says that they are only read.
    unlearned_tokens: int = 0
    # Raw files, and those of which an unknown number of samples was never seen, the first with what is known of it.
    units: int = 0
    damaged: int = 0
    first_damaged: str = ""
    # Rows of every file of rejects that there has to be.
    reject_rows: dict[Path, int] = field(default_factory=dict[Path, int])


def scan_counts(units: Sequence[IndexedUnit]) -> dict[str, ScanCounts]:
    """Counts of every source, from the footers of its index files."""
    counts: dict[str, ScanCounts] = {}
    with ThreadPoolExecutor(REQUESTS) as pool:
        footers = list(pool.map(read_counts, [unit.path for unit in units]))
    for unit, found in zip(units, footers, strict=True):
        line = counts.setdefault(unit.source, ScanCounts())
        line.read += found["read"]
        line.media += found["media"]
        line.unlearned_tokens += found["unlearned_tokens"]
        line.rejected.update(found["rejected"])
        line.media_dropped.update(found["media_dropped"])
        line.units += 1
        if rows := sum(found["rejected"].values()) + sum(found["media_dropped"].values()):
            line.reject_rows[unit.rejects] = rows
        line.damaged += bool(found["lost"])
        line.first_damaged = line.first_damaged or found["lost"]
    return counts


def settle(
    sources: Sequence[str],
    scanned: Mapping[str, ScanCounts],
    planned: Mapping[str, Mapping[str, Any]],
    results: Iterable[Mapping[str, Any]],
) -> dict[str, SourceAccount]:
    """Account of every source. planned: `sources` of plan.json. results: the shards' result files, one at a time."""
    accounts = {name: SourceAccount() for name in sources}
    for name, counts in scanned.items():
        account = accounts[name]
        account.read = counts.read
        account.rejected.update(counts.rejected)
        account.media_dropped.update(counts.media_dropped)
    for name, line in planned.items():
        account = accounts[name]
        account.repeated = line["repeated"]
        account.rejected.update(line["rejected"])
        account.parts_made, account.split_parts = line["parts"], line["split"]
        account.media_read = line["media"] + account.media_dropped.total()
    # By source, unit, row of its index and copy: the reasons of the parts that failed, and the parts that there were.
    failed_parts: defaultdict[tuple[str, str, int, int], list[tuple[str, int]]] = defaultdict(list)
    for result in results:
        for name, counts in result["packed"].items():
            accounts[name].packed += counts["whole"]
            accounts[name].parts_packed += counts["parts"]
        for row in result["rejects"]:
            account, reason = accounts[row["source"]], row["reason"]
            if row["media"] >= 0:
                account.media_dropped[reason] += 1
            elif row["parts"] == 1:
                account.rejected[reason] += 1
            else:
                account.parts_rejected[reason] += 1
                sample = (row["source"], row["unit"], row["row"], row["copy"])
                failed_parts[sample].append((reason, row["parts"]))
    for (name, *_), failures in failed_parts.items():
        # The first reason why labels were lost, if some were.
        reason = next((reason for reason, _ in failures if reason != NO_LABELS), NO_LABELS)
        if len(failures) == failures[0][1]:  # every part failed: nothing of the sample is left
            accounts[name].split_parts -= 1
            accounts[name].rejected[reason] += 1
        else:
            accounts[name].incomplete[reason] += 1
    return accounts
