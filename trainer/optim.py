"""AdamW, its learning rate as a function of the step, and gradient clipping."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shared.config import require_at_least

# Tables are looked up, not multiplied: decaying a row that a batch does not touch only forgets it.
TABLES = ("embed_tokens.weight", "position_embedding.weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    lr: float = 1e-3
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        require_at_least(self, 0, "weight_decay")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {list(self.betas)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Linear warmup, then a cosine down to `final_ratio` of the peak at the last step."""

    warmup_steps: int = 100
    final_ratio: float = 0.1

    def __post_init__(self) -> None:
        require_at_least(self, 0, "warmup_steps")
        if not 0 <= self.final_ratio <= 1:
            raise ValueError(f"final_ratio must be in [0, 1], got {self.final_ratio}")


def lr_factor(step: int, total_steps: int, schedule: ScheduleConfig) -> float:
    """Factor on the peak learning rate at step 0, 1, .. total_steps - 1; the first step already moves."""
    warmup = schedule.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)
    cosine = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return schedule.final_ratio + (1 - schedule.final_ratio) * cosine


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    beta1, beta2 = config.betas
    return torch.optim.AdamW(
        decay_groups(model, config.weight_decay),
        lr=config.lr,
        betas=(beta1, beta2),
        eps=config.eps,
        fused=True,
    )


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices decay; biases, norms and tables do not."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and not name.endswith(TABLES)
        (decayed if matrix else kept).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients so that their joint norm is at most `max_norm`; returns the norm before that.

    The norm is a 0-d tensor on the device, the same on every rank, and nothing waits for it.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    # 1e-6 as in torch's own clip_grad_norm_, which cannot take gradients of several meshes.
    torch._foreach_mul_(local, (max_norm / (norm + 1e-6)).clamp(max=1.0))  # pyright: ignore[reportPrivateImportUsage]  # what torch.optim uses
    return norm
