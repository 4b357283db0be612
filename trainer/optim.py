"""What is trained, how fast: trained parts, parameter groups of AdamW, the learning rate as a function of the step.

    lr of a parameter at a step = optimizer.lr * lr_factor(step) * the multiplier that its name is given

Parts of the model and parameters are named by `trained` and by `optimizer.lr_multipliers` in one way: a part
("encoder", "projector", "decoder") means all of it, anything else is a pattern over parameter names with the
wildcards of a shell ("decoder.layers.1?.*", "*norm*"). A recipe in stages is a config per stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn

from shared.config import require_at_least
from shared.errors import UserError, closest

PARTS = ("encoder", "projector", "decoder")
# Tables are looked up, not multiplied: decaying a row that a batch does not touch only forgets it.
TABLES = ("embed_tokens.weight", "position_embedding.weight", "cls_token", "register_tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    lr: float = 1e-3
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    lr_multipliers: dict[str, float] = field(default_factory=dict)
    """Part or pattern -> factor on lr; of several that fit a parameter the last counts, without one it is 1."""

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        require_at_least(self, 0, "weight_decay")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {list(self.betas)}")
        for name, factor in self.lr_multipliers.items():
            if factor <= 0:
                raise ValueError(
                    f"lr_multipliers.{name} must be above 0, got {factor}; leave out of `trained` what stays as it is"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Linear warmup, then one of three curves down to `final_ratio` of the peak at the last step.

    cosine    half a cosine over all steps after the warmup: its length must be known from the start
    wsd       warmup, stable, decay: the peak until `decay_steps` before the end. A run that is prolonged before
              it decays has lost nothing: its curve so far does not depend on its length
    constant  the peak to the end
    """

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = 100
    final_ratio: float = 0.1
    decay_steps: int = 0
    """wsd: steps of the decay, the last ones of the run; about a tenth of them is usual."""
    decay_shape: Literal["linear", "sqrt"] = "sqrt"
    """wsd: falls as progress, or as its square root (fast first), from the peak to `final_ratio`."""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "warmup_steps", "decay_steps")
        if not 0 <= self.final_ratio <= 1:
            raise ValueError(f"final_ratio must be in [0, 1], got {self.final_ratio}")
        if (self.kind == "wsd") != (self.decay_steps > 0):
            raise ValueError(
                f"decay_steps is {self.decay_steps} with kind {self.kind!r}: set it above 0 with 'wsd', "
                "leave it 0 with the others"
            )

    def check_length(self, steps: int) -> None:
        """Refuse a run of `steps` steps that the curve does not fit into."""
        if self.warmup_steps + self.decay_steps >= steps:
            raise ValueError(
                f"schedule.warmup_steps {self.warmup_steps} + decay_steps {self.decay_steps} leave nothing of "
                f"{steps} steps at the peak; lower them, or raise steps"
            )


def lr_factor(step: int, total_steps: int, schedule: ScheduleConfig) -> float:
    """Factor on the peak learning rate at step 0, 1, .. total_steps - 1; the first step already moves."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "wsd":
        progress = (step + 1 - total_steps + schedule.decay_steps) / schedule.decay_steps
        progress = min(max(progress, 0.0), 1.0)
        left = 1 - (progress if schedule.decay_shape == "linear" else math.sqrt(progress))
    else:
        progress = (step - schedule.warmup_steps) / max(1, total_steps - 1 - schedule.warmup_steps)
        left = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return schedule.final_ratio + (1 - schedule.final_ratio) * left


def matches(name: str, pattern: str) -> bool:
    """Whether the parameter `name` belongs to the part, or fits the pattern."""
    return name.startswith(f"{pattern}.") if pattern in PARTS else fnmatchcase(name, pattern)


def check_names(model: nn.Module, trained: Sequence[str], multipliers: Iterable[str]) -> None:
    """Refuse an entry of `trained` or `optimizer.lr_multipliers` that fits no parameter of the whole model.

    A stage has parts of the model only, so each of them could not tell.

    Raises:
        UserError: names the key, the entry and the closest match; or nothing would be trained.
    """
    if not trained:
        raise UserError(f"trained: is empty; name parts ({', '.join(PARTS)}) or patterns of what is to learn")
    names = [name for name, _ in model.named_parameters()]
    for key, patterns in (("trained", trained), ("optimizer.lr_multipliers", multipliers)):
        for pattern in patterns:
            if not any(matches(name, pattern) for name in names):
                near = closest(pattern, [*PARTS, *names])
                if not near.startswith("did"):  # a list of all names is no help
                    near = f"give {', '.join(PARTS)}, or a pattern over names such as {names[-1]!r}"
                raise UserError(f"{key}: {pattern!r} fits no parameter; {near}")


def freeze(parts: Sequence[nn.Module], trained: Sequence[str]) -> None:
    """Leave gradients only to what `trained` names; before FSDP, which reduces what has gradients."""
    for part in parts:
        for name, parameter in part.named_parameters():
            parameter.requires_grad_(any(matches(name, pattern) for pattern in trained))


def lr_multiplier(name: str, multipliers: dict[str, float]) -> float:
    """Of the entries that fit the parameter `name`, the last one's; 1 without."""
    return next((factor for entry, factor in reversed(multipliers.items()) if matches(name, entry)), 1.0)


def parameter_groups(parts: Sequence[nn.Module], config: OptimizerConfig) -> list[dict[str, Any]]:
    """A group per (multiplier, decays or not) of what is trained: matrices decay; biases, norms, tables do not.

    At least one, be it empty: a pipeline stage may hold nothing that is trained.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for part in parts:
        for name, parameter in part.named_parameters():
            if parameter.requires_grad:
                decays = parameter.ndim >= 2 and not name.endswith(TABLES)
                groups.setdefault((lr_multiplier(name, config.lr_multipliers), decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decays else 0.0,
            "lr_multiplier": multiplier,
        }
        for (multiplier, decays), parameters in (groups or {(1.0, True): []}).items()
    ]


def make_optimizer(parts: Sequence[nn.Module], config: OptimizerConfig) -> torch.optim.AdamW:
    beta1, beta2 = config.betas
    optimizer = torch.optim.AdamW(
        parameter_groups(parts, config), lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=True
    )
    set_lr(optimizer, config.lr)
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]
