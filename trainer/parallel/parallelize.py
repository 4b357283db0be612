"""Everything that is done to a model before it has weights, in the one order that works:

1. pipeline                  takes out the layers of other ranks
2. tensor parallelism        replaces parameters by DTensors; must see the plain modules
3. context parallelism       hooks: which positions are here, the exchange of keys and values
4. activation checkpointing  replaces the forward of each layer
5. compile                   compiles each layer with its checkpointing inside
6. FSDP                      shards what is left; its hooks stay outside the compiled code
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from shared.geometry import Geometry
from trainer.attention import Backend
from trainer.data.batch import Batch
from trainer.models.decoder import DecoderLayer
from trainer.models.init import init_parameters
from trainer.models.vlm import ModelConfig, VisionLanguageModel
from trainer.parallel.context import SequencePart, gather_rows
from trainer.parallel.fsdp import Reduce, set_reduction, shard
from trainer.parallel.mesh import ParallelConfig, World, sub_mesh
from trainer.parallel.pipeline import Microbatches, Pipeline, StageModel, cut_stage, stage_layers
from trainer.parallel.recompute import Recompute, checkpoint_layer
from trainer.parallel.tensor import apply_tensor_parallel
from trainer.profile import named

RECOMPILE_LIMIT = 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Loss = Callable[[Tensor, int], Tensor]
"""(nll_BS of this rank, number of the microbatch) -> what backward starts from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeConfig:
    """How the same numbers are computed: memory against time. Nothing here changes what a run learns."""

    attention: Literal["auto", "sdpa", "flex", "varlen"] = "auto"
    """auto: flex on CUDA, sdpa elsewhere."""
    recompute: Recompute = "none"
    """Activation checkpointing: what backward needs of a layer is kept, kept in part, or computed again."""
    reduce: Reduce = "step"
    """When gradients of accumulated microbatches are reduced to shards. step: once, after the last; until then each
    rank keeps all of them in float32. microbatch: after each; only shards are kept, but all travel as often."""
    compile: bool = False
    """torch.compile for every layer."""

    def backend(self, device: str) -> Backend:
        if self.attention == "auto":
            return "flex" if device == "cuda" else "sdpa"
        return self.attention


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelModel:
    """The parts of the model on this rank, and how a batch goes through them."""

    parts: list[VisionLanguageModel]
    pipeline: Pipeline | None = field(default=None)
    reduce: Reduce = "step"

    def run(self, batches: Sequence[Batch], loss: Loss, *, train: bool) -> None:
        """Forward, and backward if `train`, of all microbatches of a step; every rank calls it.

        `loss` is called for each microbatch on the ranks that have the head.
        """
        if self.pipeline is not None:
            assert len(batches) == self.pipeline.num_microbatches, "a schedule has one number of microbatches"
            # Built once, when the first stage here comes to it, which has the encoder if any has.
            feed = ((batch, self.parts[0].masks(batch)) for batch in batches)
            self.pipeline.run(feed, loss, train=train)
            return
        [model] = self.parts
        for number, batch in enumerate(batches):
            if train:
                set_reduction(model, self.reduce, last=number == len(batches) - 1)
            with named("forward"):
                share = loss(model(batch), number)
            if train:
                with named("backward"):
                    share.backward()


def build_model(
    config: ModelConfig,
    geometry: Geometry,
    world: World,
    *,
    dtype: str,
    seed: int,
    parallel: ParallelConfig | None = None,
    compute: ComputeConfig | None = None,
    microbatches: Microbatches | None = None,
    z_loss: float = 0.0,
    prepare: Callable[[Sequence[nn.Module]], None] | None = None,
) -> ParallelModel:
    """The model of this rank, on its device, initialized. Nothing is allocated before it is sharded.

    `microbatches` is needed under pipeline parallelism only. `prepare` sees the parts before FSDP does (freezing).
    """
    parallel, compute = parallel or ParallelConfig(), compute or ComputeConfig()
    backend = compute.backend(world.device.type)
    if compute.compile or backend == "flex":
        # Layers frozen in part, sizes of training and evaluation, with and without gradients: a graph for each.
        # Beyond the limit FlexAttention would fall back, without a word, to computing all scores.
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    staged = parallel.pp > 1
    cls = StageModel if staged else VisionLanguageModel
    stages = stage_layers(config.decoder.num_layers, parallel)
    own = stages[world.pp_rank :: parallel.pp]
    parts: list[VisionLanguageModel] = []
    for layers in own:
        with torch.device("meta"):
            model = cls(config, geometry, backend=backend, dtype=DTYPES[dtype], z_loss=z_loss)
        cut_stage(model, layers, config.decoder.num_layers)
        parts.append(model)
    if prepare is not None:
        prepare(parts)
    for model in parts:
        parallelize(model, world, parallel, compute, DTYPES[dtype], microbatches)
        model.to_empty(device=world.device)
        init_parameters(model, config, seed)
    return ParallelModel(
        parts=parts,
        pipeline=_pipeline(parts, config, world, parallel, DTYPES[dtype], microbatches),
        reduce=compute.reduce,
    )


def parallelize(
    model: VisionLanguageModel,
    world: World,
    parallel: ParallelConfig,
    compute: ComputeConfig,
    dtype: torch.dtype,
    microbatches: Microbatches | None,
) -> None:
    """Apply the parallelism of `world` to a part of the model on the meta device, in place."""
    mesh = world.mesh
    assert mesh is not None or dtype == torch.float32, "FSDP casts: without a mesh nothing does"
    if mesh is not None and parallel.tp > 1:
        apply_tensor_parallel(model, mesh["tp"], sequence_parallel=parallel.sequence_parallel)
    if mesh is not None and parallel.cp > 1:
        assert microbatches is not None
        sequence = SequencePart(microbatches.budget.S, world.cp_rank, mesh.get_group("cp"), world.device)
        model.sequence = sequence
        for layer in model.decoder.layers.values():
            assert isinstance(layer, DecoderLayer)
            layer.self_attn.exchange = sequence.exchange
    if mesh is not None and parallel.cp * parallel.tp > 1:
        model.gather_visual = gather_rows(sub_mesh(mesh, "cp", "tp").get_group())
    for layer in layers_of(model):
        checkpoint_layer(layer, compute.recompute)
        if compute.compile:
            # All shapes are static. Left to itself, a second size (another B, an evaluation) makes them symbols.
            layer.compile(fullgraph=True, dynamic=False)
    if mesh is not None:
        # A pipeline runs many microbatches between two updates: gathering anew for each would cost more than memory.
        shard(model, mesh, dtype, reshard_after_forward=parallel.pp == 1)


def layers_of(model: VisionLanguageModel) -> list[nn.Module]:
    encoder = [] if model.encoder is None else [*model.encoder.layers.values()]
    return [*encoder, *model.decoder.layers.values()]


def _pipeline(
    parts: Sequence[VisionLanguageModel],
    config: ModelConfig,
    world: World,
    parallel: ParallelConfig,
    dtype: torch.dtype,
    microbatches: Microbatches | None,
) -> Pipeline | None:
    if parallel.pp == 1:
        return None
    assert microbatches is not None
    stages = [part for part in parts if isinstance(part, StageModel)]
    return Pipeline(stages, world, parallel, microbatches, width=config.decoder.hidden_size, dtype=dtype)
