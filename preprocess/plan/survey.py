"""The survey: what the index holds, before anything is dealt.

    per block    samples, pieces and tokens, so that windows are equally full and mixtures have the right shares
    per source   distributions of lengths and sizes, for the report

Exact but for samples whose pictures need more rows than N or a longer one than L: these are found when their window is
planned, so a mixture is exact up to what is rejected there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from preprocess.index import read_blocks
from preprocess.plan.files import Ints, PlanSettings, PlanUnit, Run, is_validation, kept_rows
from preprocess.report.distribution import Distribution
from preprocess.samples import TEXT
from shared.tokens import TokenIds

# One record per block: row group `group` of its unit, rows [begin, begin + rows) of it. Pieces are an estimate from
# below: a cut never makes fewer.
BLOCK_DTYPE = np.dtype(
    [
        ("unit", np.int32),
        ("group", np.int32),
        ("begin", np.int32),
        ("rows", np.int32),
        ("train_pieces", np.int32),
        ("validation_pieces", np.int32),
        ("train_tokens", np.int64),
        ("train_patches", np.int64),
    ]
)

# Units of a task: its distributions, some 100 KB, are sent once for all of them.
UNITS_PER_TASK = 16

SEGMENT_COLUMNS = ("kind", "tokens", "height", "width", "t", "h", "w")
ASPECT = "image_aspect_ratio"
# Bins per factor of e of an aspect ratio, which is no integer: it is known to 1 in 4,000.
ASPECT_BINS = 2000
PERCENTILES = (5, 50, 95, 100)


@dataclass(frozen=True, slots=True)
class SurveyTask:
    """Units of one source, the first of which is unit `first` of the job."""

    first: int
    units: Sequence[PlanUnit]
    settings: PlanSettings

    def __str__(self) -> str:
        return f"survey of {self.units[0].path} and {len(self.units) - 1} more"


@dataclass(frozen=True, slots=True)
class Survey:
    """`blocks`: records of BLOCK_DTYPE. `lengths`: by name, of the samples of `source`."""

    first: int
    source: str
    blocks: npt.NDArray[np.void]
    lengths: dict[str, Distribution]


def run_survey(units: Sequence[PlanUnit], settings: PlanSettings, run: Run) -> list[Survey]:
    """Surveys of all units, in their order."""
    tasks: list[SurveyTask] = []
    first = 0
    for _, group in itertools.groupby(units, lambda unit: unit.source):
        own = list(group)
        for begin in range(0, len(own), UNITS_PER_TASK):
            tasks.append(SurveyTask(first + begin, own[begin : begin + UNITS_PER_TASK], settings))
        first += len(own)
    found: list[Survey] = run(survey_units, tasks, label="survey", total=len(tasks))
    return sorted(found, key=lambda survey: survey.first)


def survey_units(task: SurveyTask) -> Survey:
    columns = ["key_hash", *(f"segments.list.element.{name}" for name in SEGMENT_COLUMNS)]
    records: list[tuple[int, ...]] = []
    lengths: dict[str, Distribution] = {}
    for number, unit in enumerate(task.units, task.first):
        begin = 0
        for group, block in enumerate(read_blocks(unit.path, columns)):
            records.append((number, group, begin, len(block), *_count(block, unit, begin, task.settings)))
            for name, values in _lengths(block["segments"].combine_chunks()).items():
                lengths.setdefault(name, Distribution()).add(values)
            begin += len(block)
    for distribution in lengths.values():
        distribution.merge()
    return Survey(task.first, task.units[0].source, np.array(records, BLOCK_DTYPE), lengths)


def summarize(surveys: Iterable[Survey], sources: Iterable[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Count, mean and percentiles of every distribution, per source."""
    joined: dict[str, dict[str, Distribution]] = {name: {} for name in sources}
    for survey in surveys:
        for name, distribution in survey.lengths.items():
            joined[survey.source].setdefault(name, Distribution()).join(distribution)
    decoded: dict[str, Any] = {ASPECT: lambda bins: np.exp(bins / ASPECT_BINS)}
    return {
        source: {
            name: own.summary(PERCENTILES, decoded.get(name, lambda values: values))
            for name, own in columns.items()
        }
        for source, columns in joined.items()
    }


def sample_tokens(segments: pa.ListArray, ids: TokenIds) -> Ints:
    """Decoder tokens of each sample, begin and end of text included: the length of `stream.token_stream`."""
    tokens = segments.flatten().field("tokens").to_numpy().astype(np.int64)
    return _sum_per_sample(segments, tokens) + int(ids.bos is not None) + 1


def _sum_per_sample(segments: pa.ListArray, values: Ints) -> Ints:
    offsets = segment_offsets(segments)
    ends = np.concatenate([[0], np.cumsum(values)])
    return ends[offsets[1:]] - ends[offsets[:-1]]


def segment_offsets(segments: pa.ListArray) -> Ints:
    """Offsets [samples + 1] into the flattened segments."""
    offsets = segments.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0] if len(offsets) else np.zeros(1, np.int64)


def _count(block: pa.Table, unit: PlanUnit, begin: int, settings: PlanSettings) -> tuple[int, int, int, int]:
    """Train pieces, validation pieces, train tokens and train patches of one use of a block."""
    segments = block["segments"].combine_chunks()
    tokens = sample_tokens(segments, settings.ids)
    t, h, w = (segments.flatten().field(name).to_numpy().astype(np.int64) for name in ("t", "h", "w"))
    patches = _sum_per_sample(segments, t * h * w)
    pieces = -(-tokens // settings.budget.S)
    if settings.too_long[unit.source] == "reject":
        # A window must read it all the same, to tell that it is rejected.
        tokens, patches = (np.where(pieces > 1, 0, values) for values in (tokens, patches))
        pieces = np.ones_like(pieces)
    kept = kept_rows(settings.dropped, unit.first_row + begin, len(block))
    validation = is_validation(block["key_hash"].to_numpy(), settings.config.validation_fraction)
    train = kept & ~validation
    sums = pieces[train].sum(), pieces[kept & validation].sum(), tokens[train].sum(), patches[train].sum()
    return int(sums[0]), int(sums[1]), int(sums[2]), int(sums[3])


def _lengths(samples: pa.ListArray) -> dict[str, Ints]:
    """Integers of every sample or image of a block, by what they are."""
    offsets, segments = segment_offsets(samples), samples.flatten()
    field = {name: segments.field(name).to_numpy().astype(np.int64) for name in SEGMENT_COLUMNS}
    image = field["kind"] != TEXT
    text = np.concatenate([[0], np.cumsum(np.where(image, 0, field["tokens"]))])
    count = np.concatenate([[0], np.cumsum(image)])
    height, width = field["height"][image], field["width"][image]
    aspect = np.log(np.maximum(1, width) / np.maximum(1, height))
    return {
        "text_tokens_per_sample": text[offsets[1:]] - text[offsets[:-1]],
        "images_per_sample": count[offsets[1:]] - count[offsets[:-1]],
        "image_height_pixels": height,
        "image_width_pixels": width,
        ASPECT: np.rint(aspect * ASPECT_BINS).astype(np.int64),
        "image_patches": (field["t"] * field["h"] * field["w"])[image],
    }
