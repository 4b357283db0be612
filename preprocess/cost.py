"""Modelled FLOPs of a pack: what the trainer balances ranks by."""

from __future__ import annotations

from collections.abc import Iterable

from preprocess.config import CostConfig


def pack_cost(document_lengths: Iterable[int], frame_patches: Iterable[int], config: CostConfig) -> int:
    """FLOPs of one forward and backward pass over the useful tokens and patches of a pack.

    Linear layers: 6 per parameter and token (2 forward, 4 backward; arXiv:2001.08361). Attention: per layer
    and width 12 per pair of positions that attend to each other (scores and values, forward and backward);
    half the pairs of a document are causal, all pairs of an image, or of one
    frame of a video, attend. Padding is not work.
    """
    lengths, patches = list(document_lengths), list(frame_patches)
    linear = 6 * (config.decoder_parameters * sum(lengths) + config.encoder_parameters * sum(patches))
    decoder = 6 * config.decoder_layers * config.decoder_width * sum(n * n for n in lengths)
    encoder = 12 * config.encoder_layers * config.encoder_width * sum(n * n for n in patches)
    return linear + decoder + encoder
