"""Where documents and frames end, for attention that takes borders in place of masks (trainer.attention.Bounds).

Padding is a segment of its own, like a document: it attends to itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from shared.arrays import runs
from shared.schema import Pack

if TYPE_CHECKING:
    from trainer.data.batch import BatchShape

IntArray = npt.NDArray[np.int64]


def document_ends(spans: Sequence[npt.NDArray[Any]], shape: BatchShape) -> npt.NDArray[np.int32]:
    """Of all packs laid end to end, from `spans`, SPAN_DTYPE [documents] of each; missing packs are padding."""
    S = shape.budget.S
    starts = [b * S + of_pack["start"].astype(np.int64) for b, of_pack in enumerate(spans)]
    used_B = np.zeros(shape.packs, np.int64)
    used_B[: len(spans)] = [of_pack["length"].sum() for of_pack in spans]
    return _ends(starts, used_B, S)


def frame_ends(packs: Sequence[Pack], shape: BatchShape) -> npt.NDArray[np.int32]:
    """Of this rank's vision rows laid end to end."""
    L = shape.budget.L
    starts: list[IntArray] = []
    used_R = np.zeros(shape.rows, np.int64)
    for b, pack in enumerate(packs):
        own = shape.rows_of_pack(b)
        if not own:
            continue
        images = pack.images[np.searchsorted(pack.images["row"], own.start) :]
        images = images[: np.searchsorted(images["row"], own.stop)]
        t_i, frame_i = images["t"].astype(np.int64), images["h"].astype(np.int64) * images["w"]
        row_i = images["row"].astype(np.int64) + shape.place(b, 0)
        number_f = runs(np.zeros_like(t_i), t_i)  # 0 .. t - 1 of each image
        starts.append(np.repeat(row_i * L + images["offset"], t_i) + number_f * np.repeat(frame_i, t_i))
        used_R += np.bincount(row_i, weights=t_i * frame_i, minlength=shape.rows).astype(np.int64)
    return _ends(starts, used_R, L)


def _ends(starts: Sequence[IntArray], used_r: IntArray, length: int) -> npt.NDArray[np.int32]:
    """Starts of segments, of the padding behind the used part of each row, and the end of all."""
    row_r = np.arange(len(used_r), dtype=np.int64)
    padding = (row_r * length + used_r)[used_r < length]
    together = np.concatenate([*starts, padding, [len(used_r) * length]])
    return np.sort(together).astype(np.int32)
