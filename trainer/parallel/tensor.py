"""Tensor parallelism of the decoder, with or without sequence parallelism; encoder and projector have none.

    q, k, v, gate, up    by rows of the weight (heads, feed-forward width)     no communication
    o, down              by columns                                            sum over the ranks
    embed_tokens, head   by rows (vocabulary)                                  sum; three numbers per token

With sequence parallelism norms and residuals hold S / tp positions per rank: the sum after a product becomes
a reduce-scatter, and an all-gather stands before the next one. The same bytes travel, activations shrink.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from trainer.loss import VocabularyPart, chunked_nll
from trainer.models.decoder import DecoderLayer
from trainer.models.vlm import VisionLanguageModel


def apply_tensor_parallel(model: VisionLanguageModel, mesh: DeviceMesh, *, sequence_parallel: bool) -> None:
    """Shard the decoder of a stage over a mesh of one axis, in place; before anything else is done to it."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    _shard_decoder(model, mesh, sequence_parallel=sequence_parallel)
    for name in frozen:
        # `SequenceParallel` makes its parameters anew, and forgets which are frozen.
        model.get_parameter(name).requires_grad_(False)


def _shard_decoder(model: VisionLanguageModel, mesh: DeviceMesh, *, sequence_parallel: bool) -> None:
    decoder = model.decoder
    between = Shard(1) if sequence_parallel else Replicate()
    if decoder.embed_tokens is not None:
        # Whole hidden states: visual tokens are put among them before they are divided.
        rows = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
        parallelize_module(decoder.embed_tokens, mesh, rows)
        if sequence_parallel:
            parallelize_module(decoder, mesh, _first_input(Replicate(), Shard(1)))
    for layer in decoder.layers.values():
        plan: dict[str, Any] = {
            "self_attn.q_proj": ColwiseParallel(),
            "self_attn.k_proj": ColwiseParallel(),
            "self_attn.v_proj": ColwiseParallel(),
            "self_attn.o_proj": RowwiseParallel(output_layouts=between),
            "mlp.gate_proj": ColwiseParallel(),
            "mlp.up_proj": ColwiseParallel(),
            "mlp.down_proj": RowwiseParallel(output_layouts=between),
        }
        assert isinstance(layer, DecoderLayer)
        if layer.self_attn.q_norm is not None:
            # Each rank norms its own heads: the gradient of the one weight is a sum over ranks.
            heads = SequenceParallel(sequence_dim=2, use_local_output=True)
            plan |= {"self_attn.q_norm": heads, "self_attn.k_norm": heads}
        if sequence_parallel:
            plan |= {
                "input_layernorm": SequenceParallel(),
                "self_attn": _first_input(Shard(1), Replicate()),
                "post_attention_layernorm": SequenceParallel(),
                "mlp": PrepareModuleInput(
                    input_layouts=Shard(1), desired_input_layouts=Replicate(), use_local_output=True
                ),
            }
        parallelize_module(layer, mesh, plan)
    if decoder.norm is not None:
        if sequence_parallel:
            parallelize_module(decoder.norm, mesh, SequenceParallel())
        if decoder.lm_head is not None:
            parallelize_module(decoder.lm_head, mesh, ColwiseParallel())
        model.nll = VocabularyParallelNLL(mesh)


def _first_input(here: Placement, wanted: Placement) -> PrepareModuleInput:
    """Hidden states, the first of three inputs, go from one placement to another."""
    return PrepareModuleInput(
        input_layouts=(here, None, None), desired_input_layouts=(wanted, None, None), use_local_output=True
    )


class VocabularyParallelNLL:
    """In place of `chunked_nll`, for a head whose rows are divided over a mesh."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    def __call__(self, h_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor, *, z_loss: float) -> Tensor:
        assert isinstance(weight_VD, DTensor)
        if not isinstance(h_BSD, DTensor):
            h_BSD = DTensor.from_local(h_BSD, self.mesh, [Replicate()], run_check=False)
        # Forward gathers the positions; backward adds up what the ranks' parts of the vocabulary have for h.
        whole = h_BSD.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        rows, rank = weight_VD.shape[0] // self.mesh.size(), self.mesh.get_local_rank()
        part = VocabularyPart(first=rows * rank, group=self.mesh.get_group())
        return chunked_nll(whole, weight_VD.to_local(), labels_BS, z_loss=z_loss, part=part)
