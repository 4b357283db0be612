"""Activation checkpointing: what backward needs of a layer is kept, or computed again.

none        everything is kept
selective   products and attention are kept, but for products that are wider than their input (gate, up, fc1):
            those, norms, rotations and activations are computed again
full        only the input of the layer is kept; backward costs one more forward
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "selective", "full"]

aten = torch.ops.aten
ATTENTIONS = {
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_attention_math.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
}
# Operator -> which argument is the matrix on the right.
PRODUCTS = {aten.mm.default: 1, aten.addmm.default: 2}


def checkpoint_layer(layer: nn.Module, mode: Recompute) -> None:
    """Let a layer keep less, in place; names of parameters stay as they are. Before it is compiled."""
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    whole = layer.forward

    # Not wrapped in another module: names of parameters would change. A function, as the compiler traces no partial.
    def forward(*inputs: Any) -> Any:
        return checkpoint(whole, *inputs, **options)

    layer.forward = forward


def _policy(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    keep = operator in ATTENTIONS or "varlen" in str(operator)
    if operator in PRODUCTS:
        rows, columns = arguments[PRODUCTS[operator]].shape
        keep = columns <= rows
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
