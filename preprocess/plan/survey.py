"""The survey: how many samples, pieces and tokens each block of the index holds, before anything is dealt.

Only hashes and token counts are read. Exact but for samples whose pictures need more rows than N or a longer one than
L: these are found when their window is planned, so a mixture is exact up to what is rejected there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from preprocess.index import read_blocks
from preprocess.plan.files import Ints, PlanSettings, PlanUnit, is_validation, kept_rows
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
    ]
)


@dataclass(frozen=True, slots=True)
class SurveyTask:
    """Unit `number` of the job."""

    number: int
    unit: PlanUnit
    settings: PlanSettings

    def __str__(self) -> str:
        return str(self.unit.path)


def survey_unit(task: SurveyTask) -> npt.NDArray[np.void]:
    """One record of BLOCK_DTYPE for every block (row group) of the unit."""
    unit, settings = task.unit, task.settings
    begin, records = 0, []
    for group, table in enumerate(read_blocks(unit.path, ["key_hash", "segments.list.element.tokens"])):
        tokens = sample_tokens(table["segments"].combine_chunks(), settings.ids)
        usable = kept_rows(settings.dropped, unit.first_row + begin, len(table))
        if settings.too_long[unit.source] == "reject":
            usable &= tokens <= settings.budget.S
        validation = is_validation(table["key_hash"].to_numpy(), settings.config.validation_fraction)
        pieces = -(-tokens // settings.budget.S)
        train = usable & ~validation
        counts = (pieces[train].sum(), pieces[usable & validation].sum(), tokens[train].sum())
        records.append((task.number, group, begin, len(table), *counts))
        begin += len(table)
    return np.array(records, BLOCK_DTYPE)


def sample_tokens(segments: pa.ListArray, ids: TokenIds) -> Ints:
    """Decoder tokens of each sample, begin and end of text included: the length of `stream.token_stream`."""
    offsets = segment_offsets(segments)
    ends = np.concatenate([[0], np.cumsum(segments.flatten().field("tokens").to_numpy(), dtype=np.int64)])
    return ends[offsets[1:]] - ends[offsets[:-1]] + int(ids.bos is not None) + 1


def segment_offsets(segments: pa.ListArray) -> Ints:
    """Offsets [samples + 1] into the flattened segments."""
    offsets = segments.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0] if len(offsets) else np.zeros(1, np.int64)
