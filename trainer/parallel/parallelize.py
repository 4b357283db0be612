"""Everything that is done to a model before it has weights, in the one order that works:

    1. tensor parallelism        replaces parameters by DTensors; must see the plain modules
    2. activation checkpointing  wraps the forward of each layer
    3. compile                   compiles each layer with its checkpointing inside
    4. FSDP                      shards what is left; its hooks stay outside the compiled code

Context parallelism divides the inputs and pipeline parallelism the layers, before this. Only step 4 exists.
"""

from __future__ import annotations

import torch

from shared.geometry import Geometry
from trainer.models.init import init_parameters
from trainer.models.vlm import ModelConfig, VisionLanguageModel
from trainer.parallel.fsdp import shard
from trainer.parallel.mesh import World

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_model(
    config: ModelConfig, geometry: Geometry, world: World, *, dtype: str, seed: int
) -> VisionLanguageModel:
    """The model of this rank, on its device, initialized. Nothing is allocated before it is sharded."""
    with torch.device("meta"):
        model = VisionLanguageModel(config, geometry)
    parallelize(model, world, DTYPES[dtype])
    model.to_empty(device=world.device)
    init_parameters(model, config, seed)
    return model


def parallelize(model: VisionLanguageModel, world: World, dtype: torch.dtype) -> None:
    """Apply the parallelism of `world` to a model on the meta device, in place."""
    if world.mesh is not None:
        shard(model, world.mesh, dtype)
