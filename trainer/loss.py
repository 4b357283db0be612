"""Cross-entropy of the head without its logits: [T, V] never exists, only a chunk of it at a time.

Forward keeps one float per token (the log of the softmax denominator); backward computes the chunk's logits
again. That costs one more product with the head than keeping them, and saves T*V floats, the largest tensor
of the whole step (S = 8192, V = 128k: 4 GiB per pack in float32).

Under tensor parallelism each rank has the logits of its part of the vocabulary; three numbers per token
travel (maximum, sum and the label's logit), and the gradient of h comes out as this rank's summand.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shared.schema import IGNORE_LABEL

# 128 MiB of float32 logits at a time: 256 tokens at V = 128k, still large products for any device.
CHUNK_VALUES = 2**25


class VocabularyPart(NamedTuple):
    """The rows of the head that a rank has, where several share the vocabulary."""

    first: int
    group: dist.ProcessGroup


def chunked_nll(
    h_BSD: Tensor,
    weight_VD: Tensor,
    labels_BS: Tensor,
    *,
    z_loss: float = 0.0,
    part: VocabularyPart | None = None,
    chunk_values: int = CHUNK_VALUES,
) -> Tensor:
    """Negative log likelihood of each label in nats, float32 [B, S]; 0 where the label is -100.

    The softmax is taken in float32 whatever the dtype of the inputs. With `z_loss`, gradients are those of
    nll + z_loss * log(denominator)^2 (PaLM, arXiv:2204.02311), which keeps logits from drifting; the value stays
    the nll, so that runs with and without it compare. With `part`, `weight_VD` holds this rank's rows only.
    """
    chunk = max(1, chunk_values // weight_VD.shape[0])
    return _ChunkedNLL.apply(h_BSD, weight_VD, labels_BS.long(), chunk, z_loss, part)  # pyright: ignore[reportReturnType]  # apply is untyped


class _ChunkedNLL(torch.autograd.Function):
    """Inside, B and S are one axis T."""

    @staticmethod
    def forward(
        ctx: Any,
        h_BSD: Tensor,
        weight_VD: Tensor,
        labels_BS: Tensor,
        chunk: int,
        z_loss: float,
        part: VocabularyPart | None,
    ) -> Tensor:
        # Allocated in its final shape: FSDP warns about a module whose output is a view.
        nll_BS = torch.empty(labels_BS.shape, device=h_BSD.device, dtype=torch.float32)
        h_TD, nll_T = h_BSD.flatten(0, -2), nll_BS.view(-1)
        column_T, here_T = _columns(labels_BS.flatten(), weight_VD.shape[0], part)
        denominator_T, picked_T = torch.empty_like(nll_T), torch.empty_like(nll_T)
        for rows in _chunks(len(h_TD), chunk):
            logits_CV = (h_TD[rows] @ weight_VD.t()).float()
            denominator_T[rows] = logits_CV.logsumexp(dim=-1)
            picked_T[rows] = logits_CV.gather(1, column_T[rows, None]).squeeze(1)
        if part is not None:
            denominator_T = _logsumexp_over(part.group, denominator_T)
            picked_T = picked_T.masked_fill_(~here_T, 0.0)
            dist.all_reduce(picked_T, group=part.group)
        torch.sub(denominator_T, picked_T, out=nll_T)
        ctx.save_for_backward(h_BSD, weight_VD, labels_BS, denominator_T)
        ctx.chunk, ctx.z_loss, ctx.part = chunk, z_loss, part
        return nll_BS.masked_fill_(labels_BS == IGNORE_LABEL, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        """d nll / d logits = softmax - one hot; d log(denominator)^2 / d logits = 2 log(denominator) softmax."""
        h_BSD, weight_VD, labels_BS, denominator_T = ctx.saved_tensors
        h_TD, labels_T = h_BSD.flatten(0, -2), labels_BS.flatten()
        column_T, here_T = _columns(labels_T, weight_VD.shape[0], ctx.part)
        gradient_T = gradients[0].flatten().masked_fill(labels_T == IGNORE_LABEL, 0.0)
        softmax_T = gradient_T * (1 + 2 * ctx.z_loss * denominator_T) if ctx.z_loss else gradient_T
        picked_T = -gradient_T.masked_fill(~here_T, 0.0)
        h_grad_TD = torch.empty_like(h_TD)
        wanted = ctx.needs_input_grad[1]
        weight_grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wanted else None
        for rows in _chunks(len(h_TD), ctx.chunk):
            slope_CV = (h_TD[rows] @ weight_VD.t()).float().sub_(denominator_T[rows, None]).exp_()
            slope_CV.mul_(softmax_T[rows, None])
            slope_CV.scatter_add_(1, column_T[rows, None], picked_T[rows, None])
            slope_CV = slope_CV.to(h_TD.dtype)
            h_grad_TD[rows] = slope_CV @ weight_VD
            if weight_grad_VD is not None:
                weight_grad_VD += slope_CV.t() @ h_TD[rows]
        weight_grad = None if weight_grad_VD is None else weight_grad_VD.to(weight_VD.dtype)
        return h_grad_TD.view_as(h_BSD), weight_grad, None, None, None, None


def _columns(labels_T: Tensor, num_rows: int, part: VocabularyPart | None) -> tuple[Tensor, Tensor]:
    """Row of the head for each label (any where this rank does not have it), and whether it has it."""
    column_T = labels_T - (part.first if part is not None else 0)
    return column_T.clamp(0, num_rows - 1), (column_T >= 0) & (column_T < num_rows)


def _logsumexp_over(group: dist.ProcessGroup, x_T: Tensor) -> Tensor:
    largest_T = x_T.clone()
    dist.all_reduce(largest_T, dist.ReduceOp.MAX, group=group)
    sum_T = (x_T - largest_T).exp()
    dist.all_reduce(sum_T, group=group)
    return sum_T.log() + largest_T


def _chunks(length: int, chunk: int) -> Iterator[slice]:
    return (slice(start, start + chunk) for start in range(0, length, chunk))
