"""One part of the model from a Hugging Face directory, straight into (sharded) parameters.

    config.json  --check_settings-->  names and shapes of the files  --every one used, or known to be unused-->
    each parameter: this rank's slice of its tensor, any dtype -> float32

All is checked against the whole model before anything is read, so every rank, whatever it holds of the model,
meets the same error. A rank reads only its own slices, one tensor at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from shared.errors import UserError
from shared.files import read_json
from shared.geometry import Geometry
from trainer.models.vlm import ModelConfig, VisionLanguageModel
from trainer.shards import local_part
from trainer.weights.hub import HubFiles
from trainer.weights.names import NAMES, Names
from trainer.weights.settings import check_settings

Part = Literal["encoder", "decoder"]
# Tables of tokens, whose rows beyond those of the checkpoint keep their initial values.
TOKEN_TABLES = ("embed_tokens.weight", "lm_head.weight")


def load_start_weights(
    encoder: str, decoder: str, parts: Sequence[nn.Module], config: ModelConfig, geometry: Geometry
) -> list[str]:
    """Load what is named into this rank's parts of an initialized model; lines that say what was used.

    `encoder` and `decoder` are Hugging Face directories; one that is "" keeps its initial values.

    Raises:
        UserError: a directory does not fit the config; names what to change.
    """
    lines: list[str] = []
    named: tuple[tuple[Part, str], ...] = (("encoder", encoder), ("decoder", decoder))
    for part, directory in named:
        lines += load_part(Path(directory), part, parts, config, geometry) if directory else []
    return lines


def load_part(
    directory: Path, part: Part, parts: Sequence[nn.Module], config: ModelConfig, geometry: Geometry
) -> list[str]:
    """Fill this rank's parameters of the encoder or decoder; returns what was read, as lines to print.

    `parts` are what this rank holds of the model, `geometry` is the data set's. Every rank calls it; nothing is
    communicated.

    Raises:
        UserError: the directory holds another model, or a tensor that has no place here, or lacks one.
    """
    section = getattr(config, part)
    check_settings(directory, part, section)
    files, names = HubFiles(directory), NAMES[section.type]
    shapes = _whole_shapes(part, config, geometry)
    root = names.root_of(files.shapes)
    theirs = {name: names.theirs(name, root) for name in shapes}
    unused = _check_names(files, names, set(theirs.values()))
    new_rows = [
        line
        for name in shapes
        if (line := _check_shape(files, names, part, name, theirs[name], shapes[name]))
    ]
    for name, parameter in _own_parameters(part, parts):
        _read_into(parameter, files, theirs[name], convolution=name in names.convolutions)
    values = sum(shape.numel() for shape in shapes.values())
    left = "".join(f", {count} of the {what}" for what, count in sorted(unused.items()))
    return [
        f"{part:9} {values / 1e6:.2f} M parameters from {directory}: {len(theirs)} tensors of "
        f"{', '.join(sorted(files.dtypes))}; not used: {left.removeprefix(', ') or 'none'}",
        *new_rows,
        *(_other_pixels(directory, geometry) if part == "encoder" else ()),
    ]


def _whole_shapes(part: Part, config: ModelConfig, geometry: Geometry) -> dict[str, torch.Size]:
    """Shapes of the whole part, of which a rank may hold a stage or a slice."""
    with torch.device("meta"):
        model = VisionLanguageModel(config, geometry)
    return {name: parameter.shape for name, parameter in _own_parameters(part, [model])}


def _own_parameters(part: Part, parts: Sequence[nn.Module]) -> Iterable[tuple[str, nn.Parameter]]:
    """Parameters of the part, by their names inside it."""
    for model in parts:
        for name, parameter in model.named_parameters():
            if name.startswith(f"{part}."):
                yield name.removeprefix(f"{part}."), parameter


def _check_names(files: HubFiles, names: Names, wanted: set[str]) -> Counter[str]:
    """Every tensor of theirs has a place here or is known to have none: how many of which kind.

    Raises:
        UserError: names tensors that have no place, or that are missing.
    """
    unused: Counter[str] = Counter()
    unknown: list[str] = []
    for name in sorted(files.shapes.keys() - wanted):
        what = names.known_unused(name)
        unused.update([what] if what else [])
        unknown += [] if what else [name]
    for odd, says in ((sorted(wanted - files.shapes.keys()), "lacks"), (unknown, "has no place here for")):
        if odd:
            more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
            raise UserError(
                f"{files.directory}: {says} {', '.join(odd[:3])}{more}; give a directory whose model is one that "
                f"the config describes"
            )
    return unused


def _check_shape(
    files: HubFiles, names: Names, part: Part, name: str, theirs: str, shape: torch.Size
) -> str | None:
    """A line about rows that the checkpoint does not have.

    Raises:
        UserError: the shapes differ in anything else; names both.
    """
    there = files.shapes[theirs]
    if name in names.convolutions and len(there) == 4:
        there = (there[0], there[2] * there[3] * there[1])
    if there == tuple(shape):
        return None
    if name in TOKEN_TABLES and there[1:] == tuple(shape[1:]) and there[0] < shape[0]:
        return (
            f"{'':9} {part}.{name}: rows {there[0]} to {shape[0] - 1} are new and keep their initial values"
        )
    raise UserError(
        f"{files.directory}: {theirs} has shape {list(files.shapes[theirs])}, the model's {part}.{name} has "
        f"{list(shape)}; set the sizes in [{part}] to those of the checkpoint"
    )


def _other_pixels(directory: Path, geometry: Geometry) -> list[str]:
    """A line where the data set normalizes pixels otherwise than the encoder's training did, as far as it is known."""
    path = directory / "preprocessor_config.json"
    there = read_json(path, mend="download it again") if path.is_file() else {}
    mean, std = (there.get(f"image_{name}") for name in ("mean", "std"))
    if mean is None or std is None or (mean, std) == (list(geometry.mean), list(geometry.std)):
        return []
    return [
        f"{'':9} it was trained on pixels of mean {mean} and std {std}, the data set has {list(geometry.mean)} and "
        f"{list(geometry.std)}; to match, preprocess with that geometry.mean and geometry.std"
    ]


@torch.no_grad()
def _read_into(parameter: nn.Parameter, files: HubFiles, name: str, *, convolution: bool) -> None:
    """This rank's slice of a tensor, read from the file and converted."""
    local, box = local_part(parameter)
    rows = min(box[0].stop, files.shapes[name][0]) - box[0].start
    if local.numel() == 0 or rows <= 0:
        return
    box = (slice(box[0].start, box[0].start + rows), *box[1:])
    if convolution:  # [E, c, p, p] -> [E, p * p * c], as patches are stored
        value = files.read(name, (box[0],)).permute(0, 2, 3, 1).flatten(1)[:, box[1]]
    else:
        value = files.read(name, box)
    local[:rows].copy_(value)
