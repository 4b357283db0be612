"""Activation checkpointing: what backward needs of a layer is kept, or computed again.

none        everything is kept
selective   attention and its products are kept (queries, keys, values, output); the products of the MLP, norms,
            rotations and activations are computed again, as far as backward needs them: what down_proj or fc2
            gives is only added, and never computed twice but where a layer scales it
full        only the input of the layer is kept; backward costs one more forward
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor
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
        inner = {True: inner_width(layer, divided=False), False: inner_width(layer, divided=True)}
        options["context_fn"] = partial(create_selective_checkpoint_contexts, partial(_policy, inner))
    whole = layer.forward

    # Not wrapped in another module: names of parameters would change. A function, as the compiler traces no partial.
    def forward(*inputs: Any) -> Any:
        return checkpoint(whole, *inputs, **options)

    layer.forward = forward


def inner_width(layer: nn.Module, *, divided: bool) -> int | None:
    """Width of the MLP's inner values: its products have it on one side. None where one of attention has it too.

    `divided`: as this rank has it under tensor parallelism.
    """
    matrices = {
        name: (weight.to_local() if divided and isinstance(weight, DTensor) else weight).shape
        for name, weight in layer.named_parameters()
        if weight.ndim == 2
    }
    [inner] = {
        shape[1] for name, shape in matrices.items() if name.endswith(("down_proj.weight", "fc2.weight"))
    }
    attention = {width for name, shape in matrices.items() if "att" in name for width in shape}
    return None if inner in attention else inner


def _policy(
    inner: dict[bool, int | None], context: Any, operator: Any, *arguments: Any, **options: Any
) -> CheckpointPolicy:
    """`inner`: of DTensors (True), which show the shape of all ranks together, and of plain tensors."""
    keep = operator in ATTENTIONS or "varlen" in str(operator)
    if operator in PRODUCTS:
        matrix = arguments[PRODUCTS[operator]]
        keep = inner[isinstance(matrix, DTensor)] not in matrix.shape
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
