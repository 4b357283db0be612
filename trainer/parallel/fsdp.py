"""Fully sharded data parallelism (FSDP2): a unit per layer, one for the rest of the encoder, and the root.

    decoder, root         over dp_shard x cp        tensor-parallel parameters are divided over tp before
    encoder, projector    over dp_shard x cp x tp   the ranks of tp encode different vision rows
    dp_replicate > 1      copies of all that (HSDP)

Gradients come out *averaged* over the ranks of a unit. The loss is a sum over the global batch divided by its
number of labels, so whoever calls backward multiplies it by `World.loss_factor`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from trainer.models.vlm import VisionLanguageModel
from trainer.parallel.mesh import sub_mesh

Reduce = Literal["step", "microbatch"]


def shard(
    model: VisionLanguageModel, mesh: DeviceMesh, dtype: torch.dtype, *, reshard_after_forward: bool
) -> None:
    """Shard all parameters, in place: float32 shards, `dtype` inside, float32 reductions."""
    # No casting of inputs: hidden states have the dtype of the weights already, rotary angles stay float32.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    decoder_mesh, vision_mesh = _mesh(mesh, "dp_shard", "cp"), _mesh(mesh, "dp_shard", "cp", "tp")
    if model.encoder is not None and model.projector is not None:
        for unit in [*model.encoder.layers.values(), model.encoder, model.projector]:
            fully_shard(unit, mesh=vision_mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    # The embedding, the last norm and the head stay with the root: the head's weight is read by the loss.
    for unit in [*model.decoder.layers.values(), model]:
        fully_shard(unit, mesh=decoder_mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)


def _mesh(mesh: DeviceMesh, *shard_axes: str) -> DeviceMesh:
    """One axis of shards, behind one of replicas if there are any."""
    shards = sub_mesh(mesh, *shard_axes)
    replicas = mesh["dp_replicate"]
    return DeviceMesh._concatenate([replicas, shards]) if replicas.size() > 1 else shards


def set_reduction(model: nn.Module, reduce: Reduce, *, last: bool) -> None:
    """What the next backward does with its gradients, `last` in the step or not. No-op unsharded."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or reduce == "microbatch")
        # Replicas add up shards, which cost little: once per step is enough for them.
        model.set_requires_all_reduce(last)
