"""What a checkpoint holds, by names that are the same in every layout.

    model.NAME            parameters
    optimizer.NAME.KEY    what AdamW keeps of a parameter that is trained: step, exp_avg, exp_avg_sq
    extra.NAME            small tensors of the run, the same on every rank

A pipeline rank has some of the names, the ranks together have all. Learning rates and other settings are not
here: they follow from the config and the step. The tensors are the training's own, not copies of them; loading
writes into them in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import STORAGE_TYPES, TensorStorageMetadata

MODEL, OPTIMIZER, EXTRA = "model.", "optimizer.", "extra."


def named_tensors(
    parts: Sequence[nn.Module], optimizer: torch.optim.Optimizer | None, extra: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of this rank; without an optimizer those of the model alone."""
    tensors: dict[str, Tensor] = {}
    trained = 0
    for part in parts:
        # First of all: FSDP then gives back the shards in place of what a forward without backward has gathered.
        values = {MODEL + name: value for name, value in part.state_dict().items()}
        assert tensors.keys().isdisjoint(values), "two parts of the model share a name"
        tensors |= values
        if optimizer is not None:
            for name, parameter in part.named_parameters():
                moments = optimizer.state.get(parameter, {})
                trained += bool(moments)
                tensors |= {f"{OPTIMIZER}{name}.{key}": value for key, value in moments.items()}
    assert optimizer is None or trained == len(optimizer.state), "the optimizer trains what is in no part"
    return tensors | {EXTRA + name: value for name, value in extra.items()}


def start_moments(optimizer: torch.optim.Optimizer) -> None:
    """Make what AdamW itself makes at its first step, so that the names do not depend on whether there was one."""
    assert isinstance(optimizer, torch.optim.AdamW), "another optimizer keeps something else"
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                place = parameter.device if group["fused"] else "cpu"
                optimizer.state[parameter] |= {
                    "step": torch.zeros((), dtype=torch.float32, device=place),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def difference(
    tensors: Mapping[str, Tensor], saved: Mapping[str, STORAGE_TYPES], held: Sequence[int]
) -> str | None:
    """What of a checkpoint does not belong to this model, in words. Torch would read unknown entries past.

    `held[i]` is the number of ranks that have a tensor for the i-th of the sorted names of `saved`.
    """
    if missing := tensors.keys() - saved.keys():
        return f"lacks {_some(missing)}"
    if unknown := [name for name, ranks in zip(sorted(saved), held, strict=True) if not ranks]:
        return f"has unknown {_some(unknown)}"
    for name, value in tensors.items():
        entry = saved[name]
        if isinstance(entry, TensorStorageMetadata) and entry.size != value.shape:
            return f"has {name} of shape {list(entry.size)}, the model has {list(value.shape)}"
    return None


def _some(names: Iterable[str]) -> str:
    """The first three names and the number of the others."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(ordered[:3]) + more
