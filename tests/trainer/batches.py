"""Batches built by hand, the slow and obvious way: what the loader makes from shards, made from lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from shared.geometry import Budget, Geometry, patch_positions
from trainer.data.batch import Batch
from trainer.models.aimv2 import Aimv2Config
from trainer.models.decoder import DecoderConfig
from trainer.models.dinov3 import Dinov3Config
from trainer.models.encoder import EncoderConfig
from trainer.models.projector import ProjectorConfig
from trainer.models.siglip2 import Siglip2Config
from trainer.models.vlm import ModelConfig

GEOMETRY = Geometry(patch_size=2, merge=2, max_patches_per_image=64)
IMAGE, BEGIN, END, EOS, PAD, VOCABULARY = 1, 2, 3, 4, 0, 40


@dataclass(frozen=True)
class Picture:
    """t x h x w patches with random pixels."""

    h: int
    w: int
    t: int = 1
    seed: int = 0

    @property
    def patches(self) -> int:
        return self.t * self.h * self.w

    def pixels(self) -> np.ndarray:
        shape = (self.patches, GEOMETRY.values_per_patch)
        return np.random.default_rng([self.seed, self.h, self.w]).integers(0, 256, shape, dtype=np.uint8)


Document = Sequence[int | Picture]
"""Text tokens and pictures, in order."""


SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_layers": 2, "num_heads": 2, "patch_size": 2}
ENCODERS: dict[str, EncoderConfig] = {
    "siglip2": Siglip2Config(**SIZES, position_grid=4),
    "aimv2": Aimv2Config(**SIZES),
    "aimv2 learned": Aimv2Config(**SIZES, positions="learned", position_grid=4),
    "dinov3": Dinov3Config(**SIZES, num_registers=2, frames_per_row=4),
    "dinov3 gated": Dinov3Config(**SIZES, num_registers=2, frames_per_row=4, gated_mlp=True),
}


def tiny_config(encoder: EncoderConfig = ENCODERS["siglip2"], **decoder: object) -> ModelConfig:
    return ModelConfig(
        encoder=encoder,
        projector=ProjectorConfig(merge=2, hidden_size=32),
        decoder=DecoderConfig(
            **{
                "vocab_size": VOCABULARY,
                "hidden_size": 24,
                "intermediate_size": 48,
                "num_layers": 2,
                "num_heads": 4,
                "num_kv_heads": 2,
                "head_dim": 6,
                "tie_embeddings": False,
                **decoder,
            }
        ),
    )


def make_batch(packs: Sequence[Sequence[Document]], budget: Budget, merge: int = GEOMETRY.merge) -> Batch:
    """One microbatch of `packs`, each a list of documents; images fill the rows of their pack in order."""
    S, N, L, B = budget.S, budget.N, budget.L, len(packs)
    cell = merge**2
    tokens, labels = np.full((B, S), PAD), np.full((B, S), -100)
    positions, visual_index = np.zeros((B, S)), np.full((B, S), -1)
    sources = np.full((B, S), -1)
    pixels = np.zeros((B * N, L, GEOMETRY.values_per_patch), np.uint8)
    grid, ids, sizes = np.full((B * N, L, 3), -1), np.full((B * N, L), -1), np.full((B * N, L, 2), -1)
    for b, documents in enumerate(packs):
        at, row, offset, num_images = 0, b * N, 0, 0
        for document in documents:
            start = at
            for part in [*document, EOS]:
                if isinstance(part, int):
                    tokens[b, at] = part
                    if at > start:
                        labels[b, at - 1] = part
                    at += 1
                    continue
                if offset + part.patches > L:
                    row, offset = row + 1, 0
                assert row < (b + 1) * N, "the pictures do not fit the rows"
                here = slice(offset, offset + part.patches)
                pixels[row, here] = part.pixels()
                grid[row, here] = patch_positions(np.array([[part.t, part.h, part.w]]), merge)
                ids[row, here], sizes[row, here] = num_images, (part.h, part.w)
                count = part.patches // cell
                visual = (row * L + offset) // cell + np.arange(count)
                tokens[b, at : at + count + 2] = [BEGIN, *[IMAGE] * count, END]
                visual_index[b, at + 1 : at + 1 + count] = visual
                at, offset, num_images = at + count + 2, offset + part.patches, num_images + 1
            positions[b, start:at] = np.arange(at - start)
            sources[b, start:at] = 0
        positions[b, at:] = np.arange(S - at)
    integers = (
        torch.from_numpy(array.astype(np.int32))
        for array in (tokens, labels, positions, sources, visual_index)
    )
    tokens_BS, labels_BS, positions_BS, sources_BS, visual_index_BS = integers
    batch = Batch(
        tokens_BS=tokens_BS,
        labels_BS=labels_BS,
        positions_BS=positions_BS,
        sources_BS=sources_BS,
        visual_index_BS=visual_index_BS,
        pixel_values_NLP=torch.from_numpy(pixels),
        grid_thw_NL3=torch.from_numpy(grid.astype(np.int32)),
        image_ids_NL=torch.from_numpy(ids.astype(np.int32)),
        image_sizes_NL2=torch.from_numpy(sizes.astype(np.int32)),
    )
    return with_ends(batch)


def with_ends(batch: Batch) -> Batch:
    """The batch with its borders, found by looking at every position and every patch."""
    ids_NL, frame_NL = batch.image_ids_NL.numpy(), batch.grid_thw_NL3[..., 0].numpy()
    starts_NL = np.ones(ids_NL.shape, np.bool_)
    starts_NL[:, 1:] = (ids_NL[:, 1:] != ids_NL[:, :-1]) | (frame_NL[:, 1:] != frame_NL[:, :-1])
    document_ends, frame_ends = (
        torch.from_numpy(np.append(np.flatnonzero(starts), starts.size).astype(np.int32))
        for starts in (batch.positions_BS.numpy() == 0, starts_NL)
    )
    return replace(batch, document_ends=document_ends, frame_ends=frame_ends)


def num_labels(batch: Batch) -> int:
    return int((batch.labels_BS != -100).sum())
