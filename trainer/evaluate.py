"""Evaluation: loss with the right pictures, loss with the wrong ones, and their difference, the vision gain.

    vision gain = loss(wrong pictures) - loss(right pictures), in nats per label token

A model that ignores pictures has a gain of 0, however low its loss. Where fewer than two documents have
pictures there is no wrong one to show, and no gain to measure. The wrong picture of an image is one of
another document, dealt so that its shape is nearest: images sorted by shape, each gets its neighbour's
picture, resized where the grids differ. So text, placement and number of visual tokens stay the same, and
only what is seen changes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from shared.codecs import store_patches
from shared.dataset import DataSet, open_dataset
from shared.errors import UserError
from shared.geometry import Geometry, patchify, unpatchify
from shared.schema import Pack
from trainer.config import EvalConfig
from trainer.data.batch import BatchShape, assemble_batch
from trainer.parallel.mesh import World, open_world
from trainer.parallel.parallelize import ParallelModel
from trainer.run import load_run_config, restore_model

# Nats per label token, and the number of labels; None is not measurable.
Values = dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Donor:
    """The picture that takes an image's place: image `image` of pack `pack` of the evaluated packs."""

    pack: int
    image: int


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m trainer eval", description="Evaluate a run's newest checkpoint."
    )
    parser.add_argument(
        "run", type=Path, help="run directory; any key of its config can follow as --key value"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    arguments, overrides = parser.parse_known_args(argv)
    config = load_run_config(arguments.run, tuple(overrides))
    with open_world(config.device, config.dtype, config.parallel) as world:
        dataset = open_dataset(config.dataset)
        model, step = restore_model(config, dataset, world)
        values = evaluate_model(model, dataset, config.eval, world)
        if world.is_main:
            for line in [json.dumps({"step": step, **values})] if arguments.json else describe(step, values):
                print(line)


def describe(step: int, values: Values) -> list[str]:
    if values["vision_gain"] is None:
        return [
            f"after step {step}: loss {values['loss']:.4f}",
            "vision gain not measurable: it takes pictures in two of the evaluated documents; raise --eval.packs",
        ]
    return [
        f"after step {step}: loss {values['loss']:.4f}, with wrong pictures {values['loss_wrong_pictures']:.4f}",
        f"vision gain {values['vision_gain']:.4f} nats per label token",
    ]


def check_split(dataset: DataSet, config: EvalConfig) -> None:
    """Refuse at the start of a run what would fail at its end."""
    if config.split not in dataset.splits:
        raise UserError(
            f"data set {dataset.path}: no split {config.split!r} to evaluate on (it has "
            f"{', '.join(dataset.splits)}); preprocess with plan.validation_fraction, or set --eval.split"
        )


def evaluate_model(model: ParallelModel, dataset: DataSet, config: EvalConfig, world: World) -> Values:
    """loss, loss_wrong_pictures, vision_gain: nats per label token over the first packs of the split.

    Every rank calls it and gets the same numbers. Packs are dealt in turn; ranks without one left run on
    padding, so that all run the same number of forwards.
    """
    check_split(dataset, config)
    packs = [dataset.pack(config.split, i) for i in range(min(config.packs, dataset.num_packs(config.split)))]
    donors = deal_wrong_pictures(dataset, config.split, packs)
    [part] = model.parts
    loss_sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    labels = 0
    shape = BatchShape(
        packs=config.packs_per_microbatch,
        budget=dataset.budget,
        geometry=dataset.geometry,
        pad_token=dataset.tokens.pad,
    )
    step = config.packs_per_microbatch * world.dp_size
    with torch.no_grad():
        for first in range(0, len(packs), step):
            own = range(len(packs))[first : first + step][world.dp_rank :: world.dp_size]
            right = [packs[number] for number in own]
            labels += sum(int((pack.labels_S >= 0).sum()) for pack in right)
            variants = [right]
            if donors is not None:
                variants += [[with_pictures(packs[n], packs, donors[n], dataset.geometry) for n in own]]
            spans = [dataset.document_spans(config.split, number) for number in own]
            for place, chosen in enumerate(variants):
                batch = assemble_batch(chosen, spans, shape).to(world.device)
                loss_sums[place] += part(batch).double().sum()
    total = world.sum_on_host([labels])[0]
    right_loss, wrong_loss = (world.sum_on_device(loss_sums) / max(1, total)).tolist()
    return {
        "loss": right_loss,
        "loss_wrong_pictures": None if donors is None else wrong_loss,
        "vision_gain": None if donors is None else wrong_loss - right_loss,
        "labels": float(total),
    }


def deal_wrong_pictures(dataset: DataSet, split: str, packs: Sequence[Pack]) -> list[list[Donor]] | None:
    """For every image of every pack, the next image in order of shape that belongs to another document.

    None where fewer than two documents have pictures.
    """
    owner: dict[tuple[int, int], tuple[int, int]] = {}
    for p, pack in enumerate(packs):
        starts = [document.start for document in dataset.documents(split, p)]
        documents = np.searchsorted(starts, pack.images["token_start"], side="right") - 1
        owner |= {(p, i): (p, document) for i, document in enumerate(documents.tolist())}
    if len(set(owner.values())) < 2:
        return None

    def shape(place: tuple[int, int]) -> tuple[float, ...]:
        image = packs[place[0]].images[place[1]]
        t, h, w = int(image["t"]), int(image["h"]), int(image["w"])
        return (t, h / w, h * w, *place)

    ordered = sorted(owner, key=shape)
    donors = [[Donor(p, i) for i in range(len(pack.images))] for p, pack in enumerate(packs)]
    for rank, place in enumerate(ordered):
        following = (ordered[(rank + step) % len(ordered)] for step in range(1, len(ordered)))
        chosen = next(other for other in following if owner[other] != owner[place])
        donors[place[0]][place[1]] = Donor(*chosen)
    return donors


def with_pictures(pack: Pack, packs: Sequence[Pack], donors: Sequence[Donor], geometry: Geometry) -> Pack:
    """The same pack with other pictures in the places of its own."""
    blobs = [
        _fitted_patches(packs[donor.pack], donor.image, pack.images[place], geometry)
        for place, donor in enumerate(donors)
    ]
    patches_XP = np.concatenate([np.empty((0, geometry.values_per_patch), np.uint8), *blobs])
    images = pack.images.copy()
    stored = store_patches(patches_XP, images, encode=None)
    return dataclasses.replace(pack, stored=stored, images=images, decoder=None)


def _fitted_patches(donor: Pack, image: int, slot: np.void, geometry: Geometry) -> npt.NDArray[np.uint8]:
    """The donor's picture as patches of the slot's grid, uint8 [t*h*w, P]; frames repeat if there are fewer."""
    patches_XP = donor.read_image(image)
    size, wanted = ([int(entry[name]) for name in ("t", "h", "w")] for entry in (donor.images[image], slot))
    if size == wanted:
        return patches_XP
    frames_thwc = unpatchify(patches_XP, size[0], size[1], size[2], geometry)
    num_frames = wanted[0] * geometry.temporal_patch_size
    frames_thwc = frames_thwc[np.arange(num_frames) % len(frames_thwc)]
    pixels = torch.from_numpy(frames_thwc).permute(0, 3, 1, 2)
    sides = (wanted[1] * geometry.patch_size, wanted[2] * geometry.patch_size)
    resized = torch.nn.functional.interpolate(pixels, size=sides, mode=geometry.filter, antialias=True)
    view = patchify(resized.permute(0, 2, 3, 1).numpy(), geometry)
    return np.ascontiguousarray(view).reshape(-1, geometry.values_per_patch)
