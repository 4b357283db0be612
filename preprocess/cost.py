"""Modelled FLOPs: of a pack, which the trainer balances ranks by, and of its padding, which a budget is chosen by."""

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
    pairs = sum(n * n for n in lengths), sum(n * n for n in patches)
    return linear_cost(sum(lengths), sum(patches), config) + attention_cost(*pairs, config)


def linear_cost(tokens: int, patches: int, config: CostConfig) -> int:
    """FLOPs of the linear layers, which padding goes through like anything else."""
    return 6 * (config.decoder_parameters * tokens + config.encoder_parameters * patches)


def attention_cost(document_pairs: int, frame_pairs: int, config: CostConfig) -> int:
    """FLOPs of attention over documents and frames with such sums of squared lengths."""
    decoder = 6 * config.decoder_layers * config.decoder_width * document_pairs
    return decoder + 12 * config.encoder_layers * config.encoder_width * frame_pairs
