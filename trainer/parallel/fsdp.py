"""Fully sharded data parallelism (FSDP2): a unit per layer, one for the rest of the encoder, and the root.

Gradients come out *averaged* over the mesh. The loss is a sum over the global batch divided by its number of
labels, so whoever calls backward multiplies it by the size of the mesh (`trainer.step`).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from trainer.models.vlm import VisionLanguageModel


def shard(model: VisionLanguageModel, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Shard all parameters over `mesh`, in place: float32 shards, `dtype` inside, float32 reductions."""
    # No casting of inputs: hidden states have the dtype of the weights already, rotary angles stay float32.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    units: list[nn.Module] = []
    if model.encoder is not None and model.projector is not None:
        units += [*model.encoder.layers.values(), model.encoder, model.projector]
    units += model.decoder.layers.values()
    # The embedding, the last norm and the head stay with the root: the head's weight is read by the loss.
    for unit in [*units, model]:
        fully_shard(unit, mesh=mesh, mp_policy=policy)


def sync_gradients(model: nn.Module, enabled: bool) -> None:
    """Reduce gradients in the next backward or leave them on the rank, to be added to. No-op unsharded."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
