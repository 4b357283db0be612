"""What a step holds, counted on the host from the packs: what the loss, the rates and the FLOPs are computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.schema import Pack


@dataclass(frozen=True, slots=True)
class Counts:
    """Of whole packs, padding excluded: the same on all ranks that share the packs of one data-parallel rank."""

    labels: int
    tokens: int
    patches: int
    images: int
    documents: int
    token_pairs: int
    """Sum over documents of length^2: what attention in the decoder costs, causal or not."""
    patch_pairs: int
    """Sum over the frames of images of patches^2: what attention in the encoder costs."""
    labels_per_source: npt.NDArray[np.int64]
    """int64 [sources]"""

    def to_list(self) -> list[int]:
        """For sums over ranks; `from_list` is the way back."""
        *counts, per_source = astuple(self)
        return [*counts, *per_source.tolist()]

    @classmethod
    def from_list(cls, values: Sequence[int]) -> Counts:
        return cls(*values[:7], labels_per_source=np.array(values[7:], np.int64))


def count_packs(packs: Sequence[Pack], spans: Sequence[npt.NDArray[Any]], num_sources: int) -> Counts:
    """`spans`: SPAN_DTYPE [documents] of each pack."""
    counts = [_count_pack(pack, of_pack, num_sources) for pack, of_pack in zip(packs, spans, strict=True)]
    return Counts.from_list(np.array(counts, np.int64).reshape(-1, 7 + num_sources).sum(axis=0).tolist())


def _count_pack(pack: Pack, spans: npt.NDArray[Any], num_sources: int) -> list[int]:
    length_d = spans["length"].astype(np.int64)
    frame_i = pack.images["h"].astype(np.int64) * pack.images["w"]
    source_T = np.repeat(spans["source"], length_d)  # documents lie one after another from 0 on
    labelled_T = pack.labels_S[: len(source_T)] >= 0
    per_source = np.bincount(source_T[labelled_T], minlength=num_sources)
    return [
        int(per_source.sum()),
        int(length_d.sum()),
        int(frame_i @ pack.images["t"]),
        len(pack.images),
        len(spans),
        int(length_d @ length_d),
        int(frame_i**2 @ pack.images["t"]),
        *per_source.tolist(),
    ]
