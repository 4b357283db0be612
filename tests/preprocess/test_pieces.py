"""Pieces of cut samples: their segments against the definition, and what a long document costs."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from preprocess.plan.pieces import Pieces, Samples, cut_into_pieces, piece_segments
from preprocess.samples import IMAGE, TEXT, IndexSegment, segments_column
from shared.geometry import Budget
from tests.preprocess.planning import IDS, clip_segments


def samples_of(documents: list[list[IndexSegment]]) -> Samples:
    zeros = np.zeros(len(documents), np.int32)
    keys = pa.array([f"{n}" for n in range(len(documents))])
    return Samples(keys, segments_column(documents), zeros, zeros, zeros)


def cut(samples: Samples, budget: Budget) -> Pieces:
    pieces, rejects = cut_into_pieces(samples, ["web"], {"web": "split"}, budget, IDS, 0)
    assert rejects == []
    return pieces


@pytest.mark.parametrize("bos", [1, None])
def test_the_segments_of_a_part_are_those_of_its_tokens_and_the_label_behind_it(bos: int | None) -> None:
    ids = replace(IDS, bos=bos)
    rng = np.random.default_rng(0)
    documents: list[list[IndexSegment]] = []
    for _ in range(200):
        document = [IndexSegment(TEXT, "", 5, 0, int(rng.integers(1, 90)))]
        for place in range(int(rng.integers(0, 12))):
            document.append(IndexSegment(IMAGE, f"{place}.tar", 9 * place, 7, 10, 8, 9, 1, 4, 8))
            if rng.random() < 0.7:
                document.append(IndexSegment(TEXT, "", 100 * place, 0, int(rng.integers(1, 90))))
        documents.append(document)
    samples = samples_of(documents)
    samples.segments = pa.concat_arrays([segments_column([[]]), samples.segments])[
        1:
    ]  # it may begin anywhere
    pieces, _ = cut_into_pieces(samples, ["web"], {"web": "split"}, Budget(S=64, N=2, L=32), ids, 0)
    pieces = pieces.take(rng.permutation(len(pieces)))
    assert (pieces.parts > 1).sum() > 500 and (pieces.parts == 1).sum() > 10
    found = piece_segments(samples, pieces, ids).to_pylist()
    columns = zip(found, pieces.sample.tolist(), pieces.start.tolist(), pieces.end.tolist(), strict=True)
    for segments, sample, start, end in columns:
        assert [IndexSegment(**s) for s in segments] == clip_segments(documents[sample], ids, start, end)


def test_a_document_of_many_parts_costs_memory_for_its_segments_not_for_each_part_times_all() -> None:
    document = [
        segment
        for n in range(1000)
        for segment in (
            IndexSegment(IMAGE, "x.tar", n, 9, 10, 8, 9, 1, 4, 8),
            IndexSegment(TEXT, "", n, 0, 4),
        )
    ]
    samples = samples_of([document])
    pieces = cut(samples, Budget(S=64, N=2, L=32))
    assert len(pieces) == 500  # two pictures in a part
    tracemalloc.start()
    segments = piece_segments(samples, pieces, IDS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(segments) == 500
    # 2,000 segments, some arrays of 8 bytes for each; an object for each segment and part would be a million.
    assert peak < 2_000_000
