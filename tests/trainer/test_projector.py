"""The projector against transformers: the merge as a reshape of cells is its pixel unshuffle."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.models.lfm2_vl.modeling_lfm2_vl import Lfm2VlMultiModalProjector

from shared.geometry import patch_positions
from trainer.models.projector import Projector, ProjectorConfig


@pytest.mark.parametrize(("merge", "layer_norm"), [(1, True), (2, True), (2, False)])
def test_projector_equals_transformers_for_patches_stored_cell_by_cell(merge: int, layer_norm: bool) -> None:
    torch.manual_seed(0)
    h, w, width = 4, 6, 8
    ours = Projector(ProjectorConfig(merge=merge, hidden_size=16, layer_norm=layer_norm), width, 12)
    reference = Lfm2VlMultiModalProjector(
        SimpleNamespace(
            vision_config=SimpleNamespace(hidden_size=width),
            text_config=SimpleNamespace(hidden_size=12),
            downsample_factor=merge,
            projector_use_layernorm=layer_norm,
            projector_hidden_size=16,
            projector_bias=True,
            projector_hidden_act="gelu",
        )
    )
    reference.load_state_dict(ours.state_dict())
    raster_hwE = torch.randn(h, w, width)
    place = torch.from_numpy(patch_positions(np.array([[1, h, w]]), merge)).long()
    cells_1LE = raster_hwE[place[:, 1], place[:, 2]][None]
    theirs = reference(raster_hwE[None]).flatten(0, 2)
    assert (ours(cells_1LE) - theirs).abs().max() < 1e-6
