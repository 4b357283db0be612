"""The safetensors files of a Hugging Face directory, read by slices: nothing but what is asked for.

model.safetensors                                  one file
model.safetensors.index.json + model-*.safetensors several; the index says which tensor is in which
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from shared.errors import UserError

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


class HubFiles:
    """Names and shapes of all tensors, known when it is opened; values on request."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: set[str] = set()
        self._slices: dict[str, Any] = {}
        for path, promised in _files(directory).items():
            for name, part in _open(path, promised).items():
                self._slices[name] = part
                self.shapes[name] = tuple(part.get_shape())
                self.dtypes.add(part.get_dtype())

    def read(self, name: str, box: tuple[slice, ...]) -> Tensor:
        """The values of a tensor in `box`, one slice per dimension, in the dtype of the file."""
        try:
            return self._slices[name][box]
        except SafetensorError as error:
            raise UserError(f"{self.directory}: {name} cannot be read ({error}); download it again") from None


def _files(directory: Path) -> dict[Path, set[str] | None]:
    """The files, and the tensors that the index promises in each; None without an index."""
    if (directory / ONE_FILE).is_file():
        return {directory / ONE_FILE: None}
    index = directory / INDEX
    if not index.is_file():
        raise UserError(
            f"{directory}: neither {ONE_FILE} nor {INDEX} there; give a directory with safetensors"
        )
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files: dict[Path, set[str] | None] = {}
        for file in sorted(set(places.values())):
            files[directory / file] = {name for name, place in places.items() if place == file}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: is not valid ({error!r}); download it again") from None
    return files


def _open(path: Path, promised: set[str] | None) -> dict[str, Any]:
    """The tensors of one file, none of them read yet."""
    try:
        file = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); download it again") from None
    names = set(file.keys())
    if promised is not None and names != promised:
        odd = sorted(names ^ promised)[0]
        raise UserError(f"{path}: does not hold what {INDEX} says, see {odd}; download the directory again")
    return {name: file.get_slice(name) for name in sorted(names)}
