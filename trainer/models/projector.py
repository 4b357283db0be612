"""Projector: m x m patches of the encoder become one visual token of the decoder.

Patches are stored cell by cell (`shared.geometry`), so the merge is a reshape. Layers, their names and the
order of features are those of `Lfm2VlMultiModalProjector` of transformers, the target of the export.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import gelu

from shared.config import require_at_least


@dataclass(frozen=True, kw_only=True, slots=True)
class ProjectorConfig:
    merge: int = 2
    hidden_size: int = 2048
    layer_norm: bool = True

    def __post_init__(self) -> None:
        require_at_least(self, 1, "merge", "hidden_size")


class Projector(nn.Module):
    def __init__(self, config: ProjectorConfig, encoder_width: int, decoder_width: int) -> None:
        super().__init__()
        self.merged_width = encoder_width * config.merge**2
        # eps 1e-5: the default of torch and of Lfm2Vl.
        self.layer_norm = nn.LayerNorm(self.merged_width, eps=1e-5) if config.layer_norm else None
        self.linear_1 = nn.Linear(self.merged_width, config.hidden_size)
        self.linear_2 = nn.Linear(config.hidden_size, decoder_width)

    def forward(self, z_NLE: Tensor) -> Tensor:
        """Visual tokens of all rows, one after another: [N * L / m^2, D]."""
        z = z_NLE.reshape(-1, self.merged_width)
        if self.layer_norm is not None:
            z = self.layer_norm(z)
        return self.linear_2(gelu(self.linear_1(z)))
