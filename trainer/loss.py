"""Cross-entropy of the head without its logits: [T, V] never exists, only a chunk of it at a time.

Forward keeps one float per token (the log of the softmax denominator); backward computes the chunk's logits
again. That costs one more product with the head than keeping them, and saves T*V floats, the largest tensor
of the whole step (S = 8192, V = 128k: 4 GiB per pack in float32).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from shared.schema import IGNORE_LABEL

# 128 MiB of float32 logits at a time: 256 tokens at V = 128k, still large products for any device.
CHUNK_VALUES = 2**25


def chunked_nll(
    h_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor, chunk_values: int = CHUNK_VALUES
) -> Tensor:
    """Negative log likelihood of each label in nats, float32 [B, S]; 0 where the label is -100.

    The softmax is taken in float32 whatever the dtype of the inputs.
    """
    chunk = max(1, chunk_values // weight_VD.shape[0])
    return _ChunkedNLL.apply(h_BSD, weight_VD, labels_BS.long(), chunk)  # pyright: ignore[reportReturnType]  # apply is untyped


class _ChunkedNLL(torch.autograd.Function):
    """Inside, B and S are one axis T."""

    @staticmethod
    def forward(ctx: Any, h_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor, chunk: int) -> Tensor:
        # Allocated in its final shape: FSDP warns about a module whose output is a view.
        nll_BS = torch.empty(labels_BS.shape, device=h_BSD.device, dtype=torch.float32)
        h_TD, labels_T, nll_T = h_BSD.flatten(0, -2), labels_BS.flatten(), nll_BS.view(-1)
        denominator_T = torch.empty_like(nll_T)
        for rows in _chunks(len(h_TD), chunk):
            logits_CV = (h_TD[rows] @ weight_VD.t()).float()
            denominator_T[rows] = logits_CV.logsumexp(dim=-1)
            picked_C = logits_CV.gather(1, labels_T[rows, None].clamp(min=0)).squeeze(1)
            nll_T[rows] = denominator_T[rows] - picked_C
        ctx.save_for_backward(h_BSD, weight_VD, labels_BS, denominator_T)
        ctx.chunk = chunk
        return nll_BS.masked_fill_(labels_BS == IGNORE_LABEL, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None, None]:
        """d nll / d logits = softmax - one hot."""
        h_BSD, weight_VD, labels_BS, denominator_T = ctx.saved_tensors
        h_TD, labels_T = h_BSD.flatten(0, -2), labels_BS.flatten()
        gradient_T = gradients[0].flatten().masked_fill(labels_T == IGNORE_LABEL, 0.0)
        h_grad_TD = torch.empty_like(h_TD)
        weight_grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        for rows in _chunks(len(h_TD), ctx.chunk):
            slope_CV = (h_TD[rows] @ weight_VD.t()).float().sub_(denominator_T[rows, None]).exp_()
            label_C1 = labels_T[rows, None].clamp(min=0)
            slope_CV.scatter_add_(1, label_C1, slope_CV.new_full((), -1.0).expand(label_C1.shape))
            slope_CV = slope_CV.mul_(gradient_T[rows, None]).to(h_TD.dtype)
            h_grad_TD[rows] = slope_CV @ weight_VD
            weight_grad_VD += slope_CV.t() @ h_TD[rows]
        return h_grad_TD.view_as(h_BSD), weight_grad_VD.to(weight_VD.dtype), None, None


def _chunks(length: int, chunk: int) -> Iterator[slice]:
    return (slice(start, start + chunk) for start in range(0, length, chunk))
