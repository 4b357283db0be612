"""The data sets of a run as one: a table of packs, a table of sources, and the order of training.

Each data set has a weight, its share of the packs. Shares are exact: weights 0.7 and 0.3 are 7 and 3 of every 10
packs, spread evenly (`order.Cycle`). A data set goes through all its packs before it repeats one, whatever the
others do. One data set is a mixture of one.

A pack of a split is numbered 0 .. num_packs(split) - 1, data sets one after another in the order of their names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.dataset import DataSet, open_dataset
from shared.errors import UserError, closest
from shared.files import canonical_json, sha256
from shared.schema import Pack
from trainer.data.order import Cycle, IntArray, packs_of_turns

# Positions of a cycle: 16 bytes each, sorted once.
MAX_CYCLE = 1_000_000
# Packs of a list that are shown to a person.
SHOWN = 8


class Mixture:
    """`datasets` by name with their weights; the name of a single one is not used.

    Raises:
        UserError: the data sets do not agree on what a batch is, or the weights are no shares.
    """

    def __init__(self, datasets: Mapping[str, tuple[DataSet, float]]) -> None:
        self.names = sorted(datasets)
        self.datasets = [datasets[name][0] for name in self.names]
        self.quotas = exact_quotas({name: datasets[name][1] for name in self.names})
        self._cycle = Cycle(self.quotas)
        first = self.datasets[0]
        for other in self.datasets[1:]:
            check_agreement(first, other)
        self.budget, self.geometry, self.tokens = first.budget, first.geometry, first.tokens

    @cached_property
    def identity(self) -> str:
        """Hash of everything that the order of training depends on beside the seed."""
        if len(self.datasets) == 1:
            return self.datasets[0].identity
        parts = zip(self.names, self.datasets, self.quotas, strict=True)
        return sha256(canonical_json([[name, dataset.identity, quota] for name, dataset, quota in parts]))

    @property
    def encoded(self) -> bool:
        """There are frames to decode: not all data sets are of codec raw."""
        return any(dataset.codec != "raw" for dataset in self.datasets)

    @cached_property
    def sources(self) -> list[str]:
        """Names of all sources; `document_spans` numbers them. `name/source` where there are several data sets."""
        if len(self.datasets) == 1:
            return self.datasets[0].sources
        each = zip(self.names, self.datasets, strict=True)
        return [f"{name}/{source}" for name, dataset in each for source in dataset.sources]

    @property
    def splits(self) -> list[str]:
        """Splits that at least one data set has."""
        return sorted({split for dataset in self.datasets for split in dataset.splits})

    def num_packs(self, split: str) -> int:
        return int(self._starts(split)[-1])

    def pack(self, split: str, number: int) -> Pack:
        owner, index = self._locate(split, number)
        return self.datasets[owner].pack(split, index)

    def document_spans(self, split: str, number: int) -> npt.NDArray[Any]:
        """SPAN_DTYPE [documents] of one pack; `source` is a number in `sources`."""
        owner, index = self._locate(split, number)
        spans = self.datasets[owner].document_spans(split, index)
        spans["source"] += sum(len(dataset.sources) for dataset in self.datasets[:owner])
        return spans

    def costs(self, split: str, numbers: IntArray) -> IntArray:
        """Modelled FLOPs of the packs `numbers`."""
        costs = np.empty(len(numbers), np.int64)
        owner_n = np.searchsorted(self._starts(split), numbers, side="right") - 1
        for owner in np.unique(owner_n).tolist():
            here = owner_n == owner
            costs[here] = self.datasets[owner].costs(split, numbers[here] - self._starts(split)[owner])
        return costs

    def packs_of_step(self, split: str, packs_per_step: int, seed: int, step: int) -> IntArray:
        """Packs of the global batch of `step`, int64 [packs_per_step]: a pure function of its arguments."""
        owner_n, turn_n = self._cycle.turns(np.arange(step * packs_per_step, (step + 1) * packs_per_step))
        number_n = np.empty(packs_per_step, np.int64)
        starts = self._starts(split)
        for owner in np.unique(owner_n).tolist():
            here, num_packs = owner_n == owner, int(starts[owner + 1] - starts[owner])
            self._require_packs(owner, num_packs, split)
            number_n[here] = starts[owner] + packs_of_turns(num_packs, seed, turn_n[here], owner)
        return number_n

    def first_packs(self, split: str, count: int) -> IntArray:
        """`count` packs to evaluate on, or all there are: the first of each data set, in their shares.

        A data set that has no more leaves its turns to the others.
        """
        starts = self._starts(split)
        positions, numbers = [], []
        for owner, num_packs in enumerate(np.diff(starts).tolist()):
            own = min(num_packs, count)
            positions.append(self._cycle.positions(owner, own))
            numbers.append(starts[owner] + np.arange(own))
        return np.concatenate(numbers)[np.argsort(np.concatenate(positions), kind="stable")][:count]

    def describe(self, split: str, packs: int) -> list[str]:
        """One line per data set: what it has, and how often a run of so many packs repeats it."""
        sizes, taken = np.diff(self._starts(split)), self._cycle.count(packs)
        lines: list[str] = []
        each = zip(self.names, self.datasets, self.quotas, sizes.tolist(), taken.tolist(), strict=True)
        for owner, (name, dataset, quota, size, own) in enumerate(each):
            self._require_packs(owner, size, split)
            share = f"{name}: {quota / sum(self.quotas):.2%} of packs, " if len(self.names) > 1 else ""
            lines.append(
                f"{share}{size:,} packs in split {split} of {dataset.path}; the run takes {own:,} of them, "
                f"{own / size:,.2f} epochs"
            )
        return lines

    def show_packs(self, split: str, numbers: IntArray) -> str:
        """A list of packs for a person: numbers in the split, by data set where there are several."""
        parts: list[str] = []
        owner_n = np.searchsorted(self._starts(split), numbers, side="right") - 1
        for owner in np.unique(owner_n).tolist():
            own = (numbers[owner_n == owner] - self._starts(split)[owner]).tolist()
            more = f" and {len(own) - SHOWN} more" if len(own) > SHOWN else ""
            name = f"{self.names[owner]}: " if len(self.names) > 1 else ""
            parts.append(name + ", ".join(map(str, own[:SHOWN])) + more)
        return "; ".join(parts)

    def _require_packs(self, owner: int, num_packs: int, split: str) -> None:
        if not num_packs:
            raise UserError(
                f"data set {self.datasets[owner].path}: has no packs in split {split!r}; leave it out, or preprocess "
                "more of it"
            )

    def _starts(self, split: str) -> IntArray:
        """Number of the first pack of each data set in a split, and the number of packs: int64 [data sets + 1]."""
        if split not in self._starts_by_split:
            where = ", ".join(str(dataset.path) for dataset in self.datasets)
            raise UserError(f"data set {where}: no split {split!r}; {closest(split, self._starts_by_split)}")
        return self._starts_by_split[split]

    @cached_property
    def _starts_by_split(self) -> dict[str, IntArray]:
        sizes = {
            split: [dataset.num_packs(split) if split in dataset.splits else 0 for dataset in self.datasets]
            for split in self.splits
        }
        return {split: np.cumsum([0, *of_split]) for split, of_split in sizes.items()}

    def _locate(self, split: str, number: int) -> tuple[int, int]:
        starts = self._starts(split)
        owner = int(np.searchsorted(starts, number, side="right")) - 1
        return owner, number - int(starts[owner])


def open_mixture(datasets: Mapping[str, tuple[Path | str, float]]) -> Mixture:
    """Open finished data sets, each given by its directory and its weight.

    Raises:
        UserError: one cannot be opened, or they do not go together.
    """
    return Mixture({name: (open_dataset(path), weight) for name, (path, weight) in datasets.items()})


def single(dataset: DataSet) -> Mixture:
    """The mixture of one data set."""
    return Mixture({"": (dataset, 1.0)})


def exact_quotas(weights: Mapping[str, float]) -> list[int]:
    """The smallest whole numbers in the ratio of the weights as they are written."""
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(
                f"mixture.{name}.weight is {weight}; give a number above 0, or leave the data set out"
            )
    exact = [Fraction(str(weight)) for weight in weights.values()]
    common = math.lcm(*(weight.denominator for weight in exact))
    counts = [int(weight * common) for weight in exact]
    quotas = [count // math.gcd(*counts) for count in counts]
    if sum(quotas) > MAX_CYCLE:
        raise UserError(
            f"mixture: the weights are shares of {sum(quotas):,} packs, at most {MAX_CYCLE:,} are possible; "
            "round them to fewer digits"
        )
    return quotas


def check_agreement(one: DataSet, other: DataSet) -> None:
    """Refuse data sets whose packs cannot lie in one batch. Only their codecs may differ.

    Raises:
        UserError: names the first key that differs, both values and both data sets.
    """
    for section in ("budget", "geometry", "tokens"):
        here, there = asdict(getattr(one, section)), asdict(getattr(other, section))
        for key in here:
            if here[key] != there[key]:
                mend = "the tokenizer" if key == "tokenizer_sha256" else "the value"
                raise UserError(
                    f"data sets cannot be mixed: {section}.{key} is {here[key]!r} in {one.path}, "
                    f"{there[key]!r} in {other.path}; preprocess one of them again with {mend} of the other"
                )
