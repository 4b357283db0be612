"""Packs -> one microbatch of static shapes. One copy: from the mapped file into (pinned) memory.

Pack.stored  [valid patches, P], rows in order  ->  pixel_values_NLP [R, L, P], zeros behind each row
             or one frame per image             ->  the same, each frame decoded into its place
Pack.images  place of each image                ->  grid, image ids and sizes per patch
                                                ->  visual_index_BS: which visual token goes where
spans        which source a document is of      ->  sources_BS

Text is whole on every rank. Of the B*N vision rows a rank holds, reads and decodes only the R that it encodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shared.arrays import runs
from shared.errors import UserError
from shared.geometry import Budget, Geometry, patch_positions
from shared.schema import IGNORE_LABEL, Pack
from trainer.data.borders import document_ends, frame_ends
from trainer.data.pages import populate


def _no_ends() -> Tensor:
    return torch.zeros(0, dtype=torch.int32)


@dataclass(frozen=True, slots=True)
class Batch:
    """One microbatch on one rank. Padding is -1 everywhere but in tokens, labels and pixels."""

    tokens_BS: Tensor
    """int32"""
    labels_BS: Tensor
    """int32; the token to predict at this position, -100 for none"""
    positions_BS: Tensor
    """int32; restarts at 0 in every document"""
    sources_BS: Tensor
    """int32; number of the source of this position's document"""
    visual_index_BS: Tensor
    """int32; index into the visual tokens of all B*N vision rows, -1 where a position has none"""
    pixel_values_NLP: Tensor
    """uint8 [R, L, P]; not normalized"""
    grid_thw_NL3: Tensor
    """int32 [R, L, 3]; (t, h, w) of the patch in its own image"""
    image_ids_NL: Tensor
    """int32 [R, L]; which image of its pack the patch belongs to"""
    image_sizes_NL2: Tensor
    """int32 [R, L, 2]; (h, w) in patches of the image that the patch belongs to"""
    document_ends: Tensor = field(default_factory=_no_ends)
    """int32 [documents + 1]; borders of what belongs together, over the positions of all packs: documents, padding"""
    frame_ends: Tensor = field(default_factory=_no_ends)
    """int32 [frames + 1]; the same over the patches of all vision rows: frames of images, padding"""

    def to(self, device: torch.device) -> Batch:
        """A copy on `device`; asynchronous from pinned memory."""
        moved = [getattr(self, entry.name).to(device, non_blocking=True) for entry in fields(self)]
        return Batch(*moved)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchShape:
    """What all microbatches of a rank have in common."""

    packs: int
    """B"""
    budget: Budget
    geometry: Geometry
    pad_token: int
    row_part: tuple[int, int] | None = (0, 1)
    """(index, count): the vision rows are divided among `count` ranks, this one has part `index`. None: it has none,
    as a later stage of a pipeline."""
    frames_per_row: int | None = None
    """Frames that the encoder has slots for in a vision row; None: any number."""

    @property
    def rows(self) -> int:
        """R: vision rows of this rank; what B*N has not is padding, on the last ranks."""
        return 0 if self.row_part is None else -(-self.packs * self.budget.N // self.row_part[1])

    @property
    def first_row(self) -> int:
        """Number of this rank's first row among all B*N."""
        return 0 if self.row_part is None else self.row_part[0] * self.rows

    def rows_of_pack(self, b: int) -> range:
        """The rows of pack `b`, numbered within it, that this rank has."""
        N, first = self.budget.N, self.first_row - b * self.budget.N
        return range(min(max(first, 0), N), min(max(first + self.rows, 0), N))

    def place(self, b: int, row: int) -> int:
        """Where row `row` of pack `b` lies among this rank's rows."""
        return b * self.budget.N + row - self.first_row


def assemble_batch(
    packs: Sequence[Pack],
    spans: Sequence[npt.NDArray[Any]],
    shape: BatchShape,
    *,
    pin_memory: bool = False,
    decode_pool: Executor | None = None,
) -> Batch:
    """Batch in new host memory; see `fill_batch`."""
    batch = empty_batch(shape, pin_memory=pin_memory)
    fill_batch(batch, packs, spans, shape, decode_pool=decode_pool)
    ends = [torch.from_numpy(each) for each in (document_ends(spans, shape), frame_ends(packs, shape))]
    of_documents, of_frames = (each.pin_memory() for each in ends) if pin_memory else ends
    return replace(batch, document_ends=of_documents, frame_ends=of_frames)


def empty_batch(shape: BatchShape, *, pin_memory: bool = False) -> Batch:
    """Memory for a batch, of any content."""
    B, S, L, R = shape.packs, shape.budget.S, shape.budget.L, shape.rows

    def empty(*sizes: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(sizes, dtype=dtype, pin_memory=pin_memory)

    return Batch(
        tokens_BS=empty(B, S),
        labels_BS=empty(B, S),
        positions_BS=empty(B, S),
        sources_BS=empty(B, S),
        visual_index_BS=empty(B, S),
        pixel_values_NLP=empty(R, L, shape.geometry.values_per_patch, dtype=torch.uint8),
        grid_thw_NL3=empty(R, L, 3),
        image_ids_NL=empty(R, L),
        image_sizes_NL2=empty(R, L, 2),
    )


def fill_batch(
    batch: Batch,
    packs: Sequence[Pack],
    spans: Sequence[npt.NDArray[Any]],
    shape: BatchShape,
    *,
    decode_pool: Executor | None = None,
) -> None:
    """Write every value of `batch`. Packs missing to B are padding without labels.

    `spans` are SPAN_DTYPE [documents] of each pack. Frames of codecs other than raw are decoded by the threads of
    `decode_pool`, or here without one.

    Raises:
        UserError: a frame is damaged, or a vision row has more frames than the encoder has slots for.
    """
    vision = _Vision(
        batch.pixel_values_NLP.numpy(),
        batch.grid_thw_NL3.numpy(),
        batch.image_ids_NL.numpy(),
        batch.image_sizes_NL2.numpy(),
    )
    decodes: list[Future[None]] = []
    filled = 0
    for b, (pack, of_pack) in enumerate(zip(packs, spans, strict=True)):
        _check_frames(pack, shape)
        _fill_text(batch, b, pack, of_pack)
        _fill_visual_index(batch, b, pack, shape)
        if own := shape.rows_of_pack(b):
            filled = shape.place(b, own.stop)
            decodes += _fill_rows(vision, shape.place(b, own.start), own, pack, shape, decode_pool)
    for b in range(len(packs), shape.packs):
        batch.tokens_BS[b] = shape.pad_token
        batch.labels_BS[b] = IGNORE_LABEL
        batch.positions_BS[b] = torch.arange(shape.budget.S, dtype=torch.int32)
        batch.sources_BS[b] = -1
        batch.visual_index_BS[b] = -1
    for row in range(filled, shape.rows):
        vision.pad(row, 0)
    for decode in decodes:
        decode.result()


@dataclass(frozen=True, slots=True)
class _Vision:
    """The vision part of a batch in memory; rows of this rank."""

    pixels_NLP: npt.NDArray[np.uint8]
    grid_NL3: npt.NDArray[np.int32]
    ids_NL: npt.NDArray[np.int32]
    sizes_NL2: npt.NDArray[np.int32]

    def pad(self, row: int, used: int) -> None:
        """Make what lies behind the first `used` patches of a row padding."""
        self.pixels_NLP[row, used:] = 0
        self.grid_NL3[row, used:] = -1
        self.ids_NL[row, used:] = -1
        self.sizes_NL2[row, used:] = -1


def _fill_text(batch: Batch, b: int, pack: Pack, spans: npt.NDArray[Any]) -> None:
    batch.tokens_BS[b].numpy()[...] = pack.tokens_S
    batch.labels_BS[b].numpy()[...] = pack.labels_S
    batch.positions_BS[b].numpy()[...] = pack.positions_S
    sources_S, used = batch.sources_BS[b].numpy(), int(spans["length"].sum())
    sources_S[:used] = np.repeat(
        spans["source"], spans["length"]
    )  # documents lie one after another from 0 on
    sources_S[used:] = -1


def _fill_visual_index(batch: Batch, b: int, pack: Pack, shape: BatchShape) -> None:
    """Which visual token each position takes, of all rows of all packs."""
    budget, cell = shape.budget, shape.geometry.patches_per_token
    row_i, tokens_i = b * budget.N + pack.images["row"].astype(np.int64), pack.patches_i // cell
    index_S = batch.visual_index_BS[b].numpy()
    index_S.fill(-1)
    index_S[runs(pack.images["token_start"], tokens_i)] = runs(
        (row_i * budget.L + pack.images["offset"]) // cell, tokens_i
    )


def _fill_rows(
    vision: _Vision, at: int, own: range, pack: Pack, shape: BatchShape, pool: Executor | None
) -> list[Future[None]]:
    """Fill the pack's rows `own` from row `at` of the batch on; returns the decoding that a pool has still to do.

    Images follow each other without gaps and in the order of rows, so that a row is one run of patches.
    """
    borders = np.searchsorted(pack.images["row"], np.arange(own.start, own.stop + 1)).tolist()
    first, last = borders[0], borders[-1]
    images, ends = pack.images[first:last], np.concatenate([[0], np.cumsum(pack.patches_i)])
    patches_i = np.diff(ends[first : last + 1])
    if pack.decoder is None:
        populate(pack.stored[ends[first] : ends[last]])
    sizes = zip(images["t"].tolist(), images["h"].tolist(), images["w"].tolist(), strict=True)
    grids = [_positions(t, h, w, shape.geometry.merge) for t, h, w in sizes]
    ids_X = np.repeat(np.arange(first, last, dtype=np.int32), patches_i)
    size_X2 = np.repeat(np.stack([images["h"], images["w"]], axis=-1), patches_i, axis=0)
    for row, (i, j) in enumerate(pairwise(borders), start=at):
        begin, end = int(ends[i]), int(ends[j])
        used, run = end - begin, slice(begin - int(ends[first]), end - int(ends[first]))
        np.concatenate([_NO_POSITIONS, *grids[i - first : j - first]], out=vision.grid_NL3[row, :used])
        vision.ids_NL[row, :used] = ids_X[run]
        vision.sizes_NL2[row, :used] = size_X2[run]
        if pack.decoder is None:
            vision.pixels_NLP[row, :used] = pack.stored[begin:end]
        if used < shape.budget.L:
            vision.pad(row, used)
    if pack.decoder is None:
        return []
    flat_XP = vision.pixels_NLP.reshape(-1, vision.pixels_NLP.shape[-1])
    places = (at + images["row"] - own.start).astype(np.int64) * shape.budget.L + images["offset"]
    outs = [flat_XP[place : place + n] for place, n in zip(places.tolist(), patches_i.tolist(), strict=True)]
    if pool is not None:
        return [pool.submit(pack.decode_image, image, out) for image, out in enumerate(outs, start=first)]
    for image, out in enumerate(outs, start=first):
        pack.decode_image(image, out)
    return []


_NO_POSITIONS = np.empty((0, 3), np.int32)


@lru_cache(maxsize=512)  # shapes of pictures repeat; 12 bytes per patch
def _positions(t: int, h: int, w: int, merge: int) -> npt.NDArray[np.int32]:
    """(t, h, w) of each patch of an image of that size, int32 [t*h*w, 3]."""
    return patch_positions(np.array([[t, h, w]]), merge)


def _check_frames(pack: Pack, shape: BatchShape) -> None:
    """Of all rows of the pack, so that every rank that shares it refuses it."""
    if shape.frames_per_row is None or not len(pack.images):
        return
    frames_N = np.bincount(pack.images["row"], weights=pack.images["t"]).astype(np.int64)
    row = int(frames_N.argmax())
    if frames_N[row] > shape.frames_per_row:
        raise UserError(
            f"{pack.origin}: vision row {row} holds {frames_N[row]} images (frames of videos each count), the "
            f"encoder has slots for {shape.frames_per_row}; set encoder.frames_per_row to at least {frames_N[row]}"
        )
