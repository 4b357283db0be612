"""The chunked loss against torch's cross_entropy on whole logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from trainer.loss import chunked_nll


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(0, 50, (23,), dtype=torch.int32)
    labels[[0, 7, 22]] = -100
    h, weight = torch.randn(23, 8).to(dtype), torch.randn(50, 8).to(dtype)
    return h.requires_grad_(), weight.requires_grad_(), labels


# One token per chunk, a chunk that does not divide the tokens, everything at once.
@pytest.mark.parametrize("chunk_values", [50, 350, 10_000])
def test_chunked_nll_and_its_gradients_equal_cross_entropy(chunk_values: int) -> None:
    h, weight, labels = inputs()
    upstream = torch.linspace(-1, 2, 23)
    ours = chunked_nll(h, weight, labels, chunk_values=chunk_values)
    ours_grads = torch.autograd.grad(ours @ upstream, (h, weight))
    reference = cross_entropy(h @ weight.T, labels.long(), reduction="none")
    reference_grads = torch.autograd.grad(reference @ upstream, (h, weight))
    assert torch.allclose(ours, reference, atol=1e-5)
    for our, their in zip(ours_grads, reference_grads, strict=True):
        assert (our - their).norm() / their.norm() < 1e-6


def test_loss_is_float32_for_bfloat16_inputs() -> None:
    h, weight, labels = inputs(torch.bfloat16)
    ours = chunked_nll(h, weight, labels)
    ours.sum().backward()
    assert ours.dtype == torch.float32
    reference = cross_entropy((h @ weight.T).float(), labels.long(), reduction="none")
    assert torch.allclose(ours, reference, atol=1e-5)
    assert h.grad is not None and h.grad.dtype == torch.bfloat16


def test_ignored_labels_cost_nothing_and_move_nothing() -> None:
    h, weight, _ = inputs()
    nll = chunked_nll(h, weight, torch.full((23,), -100))
    nll.sum().backward()
    assert nll.eq(0).all() and h.grad is not None and h.grad.eq(0).all()


def test_z_loss_changes_the_gradients_and_not_the_value() -> None:
    torch.manual_seed(2)
    h, weight = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    labels = torch.tensor([0, 10, -100, 3, 5, -100])
    ours = chunked_nll(h, weight, labels, z_loss=0.01, chunk_values=30)
    ours.sum().backward()
    found = [h.grad.clone(), weight.grad.clone()]
    h.grad = weight.grad = None
    logits = h @ weight.t()
    plain = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert torch.allclose(ours, plain, atol=1e-6)
    learned = labels != -100
    (plain.sum() + 0.01 * logits.logsumexp(-1)[learned].square().sum()).backward()
    for gradient, expected in zip(found, (h.grad, weight.grad), strict=True):
        assert torch.allclose(gradient, expected, atol=1e-5)
