"""Packs -> one microbatch of static shapes. One copy: from the mapped file into (pinned) memory.

Pack.stored  [valid patches, P], rows in order  ->  pixel_values_NLP [B*N, L, P], zeros behind each row
             or one frame per image             ->  the same, each frame decoded into its place
Pack.images  place of each image                ->  grid, image ids and sizes per patch
                                                ->  visual_index_BS: which visual token goes where
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shared.arrays import runs
from shared.geometry import Budget, patch_positions
from shared.schema import IGNORE_LABEL, Pack


@dataclass(frozen=True, slots=True)
class Batch:
    """One microbatch on one data-parallel rank. Padding is -1 everywhere but in tokens, labels and pixels."""

    tokens_BS: Tensor
    """int32"""
    labels_BS: Tensor
    """int32; the token to predict at this position, -100 for none"""
    positions_BS: Tensor
    """int32; restarts at 0 in every document"""
    visual_index_BS: Tensor
    """int32; index into the visual tokens [B*N*L/m^2] of the batch, -1 where a position has none"""
    pixel_values_NLP: Tensor
    """uint8 [B*N, L, P]; not normalized"""
    grid_thw_NL3: Tensor
    """int32 [B*N, L, 3]; (t, h, w) of the patch in its own image"""
    image_ids_NL: Tensor
    """int32 [B*N, L]; which image of its pack the patch belongs to"""
    image_sizes_NL2: Tensor
    """int32 [B*N, L, 2]; (h, w) in patches of the image that the patch belongs to"""

    def to(self, device: torch.device) -> Batch:
        """A copy on `device`; asynchronous from pinned memory."""
        moved = [getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)]
        return Batch(*moved)


def assemble_batch(
    packs: Sequence[Pack],
    *,
    packs_per_microbatch: int,
    budget: Budget,
    values_per_patch: int,
    merge: int,
    pad_token: int,
    pin_memory: bool = False,
    decode_pool: Executor | None = None,
) -> Batch:
    """Batch in host memory; packs missing to `packs_per_microbatch` are padding without labels.

    Frames of codecs other than raw are decoded by the threads of `decode_pool`, or here without one.

    Raises:
        UserError: a frame is damaged.
    """
    B, S, N, L, P = packs_per_microbatch, budget.S, budget.N, budget.L, values_per_patch

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=pin_memory)

    batch = Batch(
        tokens_BS=empty(B, S),
        labels_BS=empty(B, S),
        positions_BS=empty(B, S),
        visual_index_BS=empty(B, S).fill_(-1),
        pixel_values_NLP=empty(B * N, L, P, dtype=torch.uint8),
        grid_thw_NL3=empty(B * N, L, 3).fill_(-1),
        image_ids_NL=empty(B * N, L).fill_(-1),
        image_sizes_NL2=empty(B * N, L, 2).fill_(-1),
    )
    decodes: list[Future[None]] = []
    for b in range(B):
        if b < len(packs):
            pixels_NLP = batch.pixel_values_NLP[b * N : (b + 1) * N].numpy()
            if packs[b].decoder is None:
                _copy_pixels(pixels_NLP, packs[b])
            else:
                decodes += _decode_pixels(pixels_NLP, packs[b], decode_pool)
            _fill_text(batch, b, packs[b])
            _fill_places(batch, b, packs[b].images, budget, merge)
        else:
            batch.tokens_BS[b] = pad_token
            batch.labels_BS[b] = IGNORE_LABEL
            batch.positions_BS[b] = torch.arange(S, dtype=torch.int32)
            batch.pixel_values_NLP[b * N : (b + 1) * N] = 0
    for decode in decodes:
        decode.result()
    return batch


def used_tokens(pack: Pack, pad_token: int) -> int:
    """Tokens of a pack that belong to documents. Padding is the last run of positions, if it is pad tokens."""
    last = int(np.flatnonzero(pack.positions_S == 0)[-1])
    return last if (pack.tokens_S[last:] == pad_token).all() else len(pack.tokens_S)


def _fill_text(batch: Batch, b: int, pack: Pack) -> None:
    batch.tokens_BS[b].numpy()[...] = pack.tokens_S
    batch.labels_BS[b].numpy()[...] = pack.labels_S
    batch.positions_BS[b].numpy()[...] = pack.positions_S


def _copy_pixels(pixels_NLP: npt.NDArray[np.uint8], pack: Pack) -> None:
    """Each vision row is one run of the blob: one copy per row, and zeros behind it."""
    begin = 0
    for row_LP, used in zip(pixels_NLP, _used_patches(pack, len(pixels_NLP)), strict=True):
        row_LP[:used] = pack.stored[begin : begin + used]
        row_LP[used:] = 0
        begin += used


def _decode_pixels(
    pixels_NLP: npt.NDArray[np.uint8], pack: Pack, pool: Executor | None
) -> list[Future[None]]:
    """Each image is decoded into its place; what a pool has still to do is returned."""
    for row_LP, used in zip(pixels_NLP, _used_patches(pack, len(pixels_NLP)), strict=True):
        row_LP[used:] = 0
    places = zip(
        pack.images["row"].tolist(), pack.images["offset"].tolist(), pack.patches_i.tolist(), strict=True
    )
    outs = [pixels_NLP[row, offset : offset + patches] for row, offset, patches in places]
    if pool is not None:
        return [pool.submit(pack.decode_image, image, out) for image, out in enumerate(outs)]
    for image, out in enumerate(outs):
        pack.decode_image(image, out)
    return []


def _used_patches(pack: Pack, num_rows: int) -> list[int]:
    """Patches in each vision row."""
    used_N = np.bincount(pack.images["row"], weights=pack.patches_i, minlength=num_rows)
    return used_N.astype(np.int64).tolist()


def _fill_places(batch: Batch, b: int, images: npt.NDArray[np.void], budget: Budget, merge: int) -> None:
    """Per patch: position, image and image size. Per token: its visual token. No loop over images."""
    if not len(images):
        return
    size_i3 = np.stack([images["t"], images["h"], images["w"]], axis=-1).astype(np.int64)
    count_i = size_i3.prod(axis=1)
    first_i = (b * budget.N + images["row"].astype(np.int64)) * budget.L + images["offset"]
    place_X = runs(first_i, count_i)
    batch.grid_thw_NL3.view(-1, 3).numpy()[place_X] = patch_positions(size_i3, merge)
    batch.image_ids_NL.view(-1).numpy()[place_X] = np.repeat(np.arange(len(images)), count_i)
    batch.image_sizes_NL2.view(-1, 2).numpy()[place_X] = np.repeat(size_i3[:, 1:], count_i, axis=0)
    tokens_i = count_i // merge**2
    token_v = runs(b * budget.S + images["token_start"].astype(np.int64), tokens_i)
    batch.visual_index_BS.view(-1).numpy()[token_v] = runs(first_i // merge**2, tokens_i)
