"""`python -m trainer check-export RUN OUT`: does transformers compute what the run computes?

    documents of the data set --packed, as in training-->   our model           --> logits --+
                              --one at a time, raster-->    OUT in transformers --> logits --+--> max |difference|

So it covers names, layouts, settings, the order of patches and pixels, and that packing changes nothing. One
process on the CPU, in float32: weights exported as bfloat16 are compared with ours rounded to bfloat16.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor

from shared.errors import UserError
from shared.files import read_json
from shared.geometry import Geometry
from shared.schema import Pack
from trainer.checkpoint import complete_checkpoints
from trainer.config import RunConfig
from trainer.data.batch import BatchShape, assemble_batch
from trainer.data.mixture import Mixture
from trainer.models.vision import normalize_pixels
from trainer.models.vlm import VisionLanguageModel
from trainer.run import checkpoint_directory, load_run_config, open_data
from trainer.weights.checkpoint_tensors import CheckpointTensors

# Two float32 programs that do the same differ by about 1e-6 of the scale; a wrong activation by 1e-3.
TOLERANCE = 1e-4
DOCUMENTS = 8
# Positions whose logits are held at a time.
CHUNK = 256
EXPORTED = "export.json"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m trainer check-export",
        description="Compare the logits of an export, in transformers, with those of the run it was made from.",
    )
    parser.add_argument(
        "run", type=Path, help="run directory; any key of its config can follow as --key value"
    )
    parser.add_argument("export", type=Path, help="directory that `python -m trainer export` made")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    arguments, overrides = parser.parse_known_args(argv)
    config = load_run_config(arguments.run, tuple(overrides))
    result = check_export(config, open_data(config), arguments.export)
    print(json.dumps(result) if arguments.json else describe(result))


def describe(result: dict[str, Any]) -> str:
    return (
        f"same: largest difference {result['difference']:.1e} of the logits' scale {result['scale']:.3g} over "
        f"{result['documents']} documents, {result['tokens']:,} tokens, {result['pictures']} pictures"
    )


def check_export(config: RunConfig, data: Mixture, export: Path) -> dict[str, Any]:
    """Compare; `difference` is relative to the largest logit.

    Raises:
        UserError: they differ, the export cannot be loaded, or there is nothing to compare.
    """
    ours, theirs = load_ours(config, data.geometry, export), load_theirs(export)
    result = {"difference": 0.0, "scale": 0.0, "documents": 0, "tokens": 0, "pictures": 0}
    largest = 0.0
    for sample in read_samples(data, config.eval.split):
        difference, scale = compare(sample, ours, theirs, data)
        largest, result["scale"] = max(largest, difference), max(result["scale"], scale)
        result["documents"] += 1
        result["tokens"] += sample.positions.stop - sample.positions.start
        result["pictures"] += len(sample.images)
    if not result["documents"]:
        raise UserError(
            f"split {config.eval.split!r}: no document of it can be compared on; set --eval.split"
        )
    result["difference"] = largest / result["scale"]
    if not result["difference"] <= TOLERANCE:
        raise UserError(
            f"{export}: is not the model of run {config.out}: logits differ by {result['difference']:.1e} of their "
            f"scale, {TOLERANCE:.0e} is allowed; export it again, and report this if it stays"
        )
    return result


@dataclass(frozen=True, slots=True)
class Sample:
    """One document of a pack."""

    pack: Pack
    spans: npt.NDArray[Any]
    """SPAN_DTYPE of all documents of the pack."""
    positions: slice
    images: list[int]
    """Numbers, inside the pack, of its pictures."""


def read_samples(data: Mixture, split: str) -> Iterator[Sample]:
    """The first documents of a split that the reference can compute.

    torch's interpolation of positions is wrong on the CPU for pictures one patch wide and several high, which only
    transformers meets.
    """
    taken = 0
    for number in range(data.num_packs(split)):
        pack, spans = data.pack(split, number), data.document_spans(split, number)
        for begin, length in zip(spans["start"].tolist(), spans["length"].tolist(), strict=True):
            start_i = pack.images["token_start"]
            inside_i = (start_i >= begin) & (start_i < begin + length)
            narrow_i = (pack.images["w"] == 1) & (pack.images["h"] > 1)
            if (inside_i & narrow_i).any():
                continue
            if taken == DOCUMENTS:
                return
            taken += 1
            yield Sample(pack, spans, slice(begin, begin + length), np.flatnonzero(inside_i).tolist())


@torch.no_grad()
def compare(sample: Sample, ours: VisionLanguageModel, theirs: Any, data: Mixture) -> tuple[float, float]:
    """Largest difference of the logits of a document, and our largest logit."""
    shape = BatchShape(packs=1, budget=data.budget, geometry=data.geometry, pad_token=data.tokens.pad)
    batch = assemble_batch([sample.pack], [sample.spans], shape)
    h_TD = ours.hidden(batch)[0, sample.positions]
    tokens = torch.from_numpy(sample.pack.tokens_S[sample.positions].astype(np.int64))[None]
    their_h_TD = theirs.model(input_ids=tokens, **pictures_of(sample, data.geometry)).last_hidden_state[0]
    difference = scale = 0.0
    for rows in torch.arange(len(h_TD)).split(CHUNK):
        logits = h_TD[rows] @ ours.decoder.head_weight.t()
        difference = max(difference, (logits - theirs.lm_head(their_h_TD[rows])).abs().max().item())
        scale = max(scale, logits.abs().max().item())
    return difference, scale


def pictures_of(sample: Sample, geometry: Geometry) -> dict[str, Tensor]:
    """What the tower of transformers takes: frames one by one, normalized, raster order, padded to the largest."""
    frames: list[npt.NDArray[np.uint8]] = []
    shapes: list[tuple[int, int]] = []
    for image in sample.images:
        t, h, w = (int(sample.pack.images[image][name]) for name in ("t", "h", "w"))
        patches_tNP = rearrange(
            sample.pack.read_image(image),
            "(t h w mh mw) P -> t (h mh w mw) P",
            t=t,
            h=h // geometry.merge,
            w=w // geometry.merge,
            mh=geometry.merge,
            mw=geometry.merge,
        )
        frames += list(patches_tNP.copy())  # what torch takes must be writable, a mapped file is not
        shapes += [(h, w)] * t
    if not frames:
        return {}
    lengths = torch.tensor([len(frame) for frame in frames])
    pixels = torch.nn.utils.rnn.pad_sequence(
        [normalize_pixels(torch.from_numpy(frame), geometry.mean, geometry.std) for frame in frames],
        batch_first=True,
    )
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).int()
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor(shapes)}


def load_ours(config: RunConfig, geometry: Geometry, export: Path) -> VisionLanguageModel:
    """The model of the checkpoint that was exported, rounded to the dtype of the export."""
    exported = read_json(export / EXPORTED, mend="give a directory that `python -m trainer export` made")
    checkpoints = {path.name: path for path in complete_checkpoints(checkpoint_directory(Path(config.out)))}
    name = f"step_{exported['step']:08d}"
    if name not in checkpoints:
        raise UserError(f"run {config.out}: {name}, which {export} was made from, is gone; export it again")
    model = VisionLanguageModel(config.model, geometry).eval()
    CheckpointTensors(checkpoints[name], config.model).read_into(dict(model.named_parameters()))
    dtype = getattr(torch, exported["dtype"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    return model


def load_theirs(export: Path) -> Any:
    try:
        from transformers import AutoModelForImageTextToText
    except ImportError:
        raise UserError("the check needs transformers; install it with `pip install transformers`") from None
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        export, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    model, report = loaded
    if odd := {kind: names for kind, names in report.items() if names}:
        raise UserError(f"{export}: transformers does not take all of it: {odd}; export it again")
    return model.eval()
