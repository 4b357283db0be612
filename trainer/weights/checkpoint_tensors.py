"""The model's tensors of a checkpoint by name, without building the model on a device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from shared.errors import UserError
from shared.geometry import Geometry
from trainer.checkpoint import verify_files
from trainer.checkpoint_errors import failures_named
from trainer.checkpoint_state import MODEL
from trainer.models.vlm import ModelConfig, VisionLanguageModel


class CheckpointTensors:
    """Shapes, known when it is opened, and values on request, whatever layout wrote them."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        """
        Raises:
            UserError: the checkpoint is damaged, or holds another model.
        """
        self._path, self._reader = path, FileSystemReader(path)
        with failures_named(path, "read"):
            verify_files(path)
            saved: dict[str, Any] = self._reader.read_metadata().state_dict_metadata
        there = {
            name.removeprefix(MODEL): entry.size for name, entry in saved.items() if name.startswith(MODEL)
        }
        with torch.device("meta"):
            model = VisionLanguageModel(config, Geometry())
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        if odd := sorted(
            name for name in self.shapes.keys() | there.keys() if self.shapes.get(name) != there.get(name)
        ):
            raise UserError(f"checkpoint {path}: is of another model than the config's, see {odd[0]}")

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill whole tensors on the CPU; each piece is converted to their dtype as it arrives."""
        load(
            {MODEL + name: tensor for name, tensor in tensors.items()},
            storage_reader=self._reader,
            no_dist=True,
        )
