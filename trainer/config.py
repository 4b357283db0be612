"""The config of a training run: one TOML file, `--key value` on top (see shared.config).

What the data set decides (S, N, L, normalization, token ids) is not here: it is read from `dataset.json`,
and a model that does not fit it is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from shared.config import require_at_least
from trainer.checkpoint import CheckpointConfig
from trainer.guard import GuardConfig
from trainer.metrics import LogConfig
from trainer.models.decoder import DecoderConfig
from trainer.models.encoder import EncoderConfig
from trainer.models.projector import ProjectorConfig
from trainer.models.siglip2 import Siglip2Config
from trainer.models.vlm import ModelConfig
from trainer.optim import PARTS, OptimizerConfig, ScheduleConfig
from trainer.parallel.mesh import ParallelConfig
from trainer.parallel.parallelize import ComputeConfig
from trainer.profile import ProfileConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """The global batch is a number of packs, the same on any number of ranks."""

    packs_per_step: int = 8
    """Packs in one optimizer step, over all ranks."""
    packs_per_microbatch: int = 1
    """B: packs in one forward on one rank; what it does not reach is accumulated."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "packs_per_step", "packs_per_microbatch")

    def accumulation(self, dp_size: int) -> int:
        """Microbatches per step on each of `dp_size` data-parallel ranks."""
        together = self.packs_per_microbatch * dp_size
        if self.packs_per_step % together:
            raise ValueError(
                f"batch.packs_per_step {self.packs_per_step} is no multiple of {together} = "
                f"{self.packs_per_microbatch} packs_per_microbatch x {dp_size} ranks"
            )
        return self.packs_per_step // together


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    every: int = 0
    """Steps between evaluations; 0 evaluates only after the last step."""
    split: str = "validation"
    """Split of the data set to evaluate on."""
    packs: int = 64
    """Packs of it to use at most, over all ranks."""
    packs_per_microbatch: int = 1

    def __post_init__(self) -> None:
        require_at_least(self, 0, "every")
        require_at_least(self, 1, "packs", "packs_per_microbatch")


@dataclass(frozen=True, kw_only=True, slots=True)
class StartConfig:
    """Weights to start from; a run that has checkpoints goes on from them instead."""

    encoder: str = ""
    """Directory of Hugging Face weights for the encoder."""
    decoder: str = ""
    """Directory of Hugging Face weights for the decoder."""
    run: str = ""
    """Another run of the same model: its newest checkpoint. So "projector first, then all" is two configs."""

    def __post_init__(self) -> None:
        if self.run and (self.encoder or self.decoder):
            raise ValueError(f"run {self.run!r} has weights for all parts; leave out encoder and decoder")


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureEntry:
    """One of several data sets."""

    path: str
    weight: float = 1.0
    """Share of the packs, relative to the other data sets' weights."""

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"weight must be above 0, got {self.weight}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    dataset: str = ""
    """Directory that holds dataset.json; several: [mixture.NAME] path, weight."""
    mixture: dict[str, MixtureEntry] = field(default_factory=dict)
    out: str
    """Run directory: config.toml, run.json, metrics.jsonl, tensorboard/, checkpoints/."""
    steps: int
    trained: tuple[str, ...] = PARTS
    """What is trained: parts (encoder, projector, decoder) or patterns over parameter names; the rest is frozen."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax denominator in what gradients minimize; 1e-4 is usual, 0 none."""
    seed: int = 0
    decode_threads: int = 2
    """Threads per rank that decode patches ahead of the step; unused with codec raw (benchmarks/codecs.py)."""
    device: Literal["cpu", "cuda"] = "cuda"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What the model computes in. Weights, reductions, softmax and loss are float32 either way."""
    encoder: EncoderConfig = field(default_factory=Siglip2Config)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    start: StartConfig = field(default_factory=StartConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        require_at_least(self, 1, "steps", "decode_threads")
        require_at_least(self, 0, "z_loss")
        if bool(self.dataset) == bool(self.mixture):
            raise ValueError(
                "name one data set (dataset = DIRECTORY) or several ([mixture.NAME] path, weight), "
                f"got {'both' if self.dataset else 'neither'}"
            )
        if not self.trained:
            raise ValueError("trained is empty: name what is trained (encoder, projector, decoder)")
        self.schedule.check_length(self.steps)
        if self.parallel.pp > 1 and self.eval.packs_per_microbatch != self.batch.packs_per_microbatch:
            raise ValueError(
                f"eval.packs_per_microbatch {self.eval.packs_per_microbatch} must be batch.packs_per_microbatch "
                f"{self.batch.packs_per_microbatch} with parallel.pp above 1: a pipeline has one size"
            )

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(encoder=self.encoder, projector=self.projector, decoder=self.decoder)
