"""Pictures of other documents in the places of a pack's own: what a model that looks at pictures must notice.

Images are sorted by shape, and each gets the picture of the next one that belongs to another document, resized
where the grids differ. So text, placement and number of visual tokens stay the same, and only what is seen
changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shared.codecs import store_patches
from shared.geometry import Geometry, patchify, unpatchify
from shared.schema import Pack


@dataclass(frozen=True, slots=True)
class Donor:
    """The picture that takes an image's place: image `image` of pack `pack` of the evaluated packs."""

    pack: int
    image: int


def owners_of(pack: Pack, spans: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Which document of its pack each image belongs to, int64 [images]; `spans`: SPAN_DTYPE [documents]."""
    return np.searchsorted(spans["start"], pack.images["token_start"], side="right") - 1


def deal_wrong_pictures(packs: Sequence[Pack], spans: Sequence[npt.NDArray[Any]]) -> list[list[Donor]] | None:
    """For every image of every pack, the next image in order of shape that belongs to another document.

    None where fewer than two documents have pictures.
    """
    owner: dict[tuple[int, int], tuple[int, int]] = {}
    for p, (pack, of_pack) in enumerate(zip(packs, spans, strict=True)):
        owner |= {(p, i): (p, document) for i, document in enumerate(owners_of(pack, of_pack).tolist())}
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


def with_pictures(
    pack: Pack, packs: Sequence[Pack], donors: Sequence[Donor], geometry: Geometry, rows: range
) -> Pack:
    """The same pack with other pictures in the places of its own; outside of `rows` there are none."""
    ends = np.cumsum(pack.patches_i)
    patches_XP = np.zeros((pack.num_patches, geometry.values_per_patch), np.uint8)
    for place, donor in enumerate(donors):
        slot = pack.images[place]
        if slot["row"] in rows:
            here = slice(int(ends[place] - pack.patches_i[place]), int(ends[place]))
            patches_XP[here] = _fitted_patches(packs[donor.pack], donor.image, slot, geometry)
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
