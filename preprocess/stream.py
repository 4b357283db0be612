"""The token stream of one sample, and where it is cut when it does not fit one pack.

    [bos] text.. <begin_image> [image] * n <end_image> text.. <eos>
    labels: the next token of the same sample, or -100 where that is an image, begin, end, unlearned or no token

A part after a cut takes its last label from the part behind it, so every text token is learned exactly once,
also the first one after a cut.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from preprocess.samples import TEXT, IndexSegment
from shared.geometry import Budget
from shared.schema import IGNORE_LABEL
from shared.tokens import TokenIds, Tokens


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens [start, end) of a sample's stream, with its images [first_image, last_image)."""

    start: int
    end: int
    first_image: int
    last_image: int


def stream_length(segments: Sequence[IndexSegment], ids: TokenIds) -> int:
    return int(ids.bos is not None) + sum(segment.tokens for segment in segments) + 1


def image_starts(segments: Sequence[IndexSegment], ids: TokenIds) -> list[int]:
    """Position of each image's begin token in the stream."""
    starts: list[int] = []
    position = int(ids.bos is not None)
    for segment in segments:
        if segment.kind != TEXT:
            starts.append(position)
        position += segment.tokens
    return starts


def token_stream(
    segments: Sequence[IndexSegment],
    texts: Sequence[Tokens],
    ids: TokenIds,
    *,
    first: bool = True,
    last: bool = True,
) -> tuple[Tokens, Tokens]:
    """Tokens and labels of a sample, or of a part of one, int32 [n].

    `texts` are the tokens of its text segments, ~token where it is not learned. `first` and `last` say whether
    begin and end of text belong to it.
    """
    pieces: list[Tokens] = [np.array([ids.bos], np.int32)] if first and ids.bos is not None else []
    remaining = iter(texts)
    for segment in segments:
        if segment.kind == TEXT:
            pieces.append(next(remaining))
        else:
            image = np.full(segment.tokens, ~ids.image, np.int32)
            image[0], image[-1] = ~ids.begin_image, ~ids.end_image
            pieces.append(image)
    if last:
        pieces.append(np.array([ids.eos], np.int32))
    values = np.concatenate([*pieces, np.empty(0, np.int32)])
    tokens = np.where(values < 0, ~values, values)
    labels = np.full_like(tokens, IGNORE_LABEL)
    labels[:-1] = np.where(values[1:] < 0, IGNORE_LABEL, values[1:])
    return tokens, labels


def split_sample(
    segments: Sequence[IndexSegment], ids: TokenIds, budget: Budget, images_per_row: int = 0
) -> list[Part] | str:
    """Cut a sample into parts that each fit one pack, or name the budget ("S", "N" or "L") that blocks it.

    A cut never falls inside an image. A sample that fits is one part. Parts are equal in tokens and patches together,
    as far as images allow: equal ones leave no crumbs and fill packs up to 0.9 % better. No part is without labels
    where moving the cut before it can help.
    """
    images = [segment for segment in segments if segment.kind != TEXT]
    if any(image.patches > budget.L for image in images):
        return "L"
    if any(image.tokens > budget.S for image in images):
        return "S"
    parts = cut_where_full(segments, ids, budget, images_per_row)
    if len(parts) == 1:
        return parts
    fits = _Fits([image.patches for image in images], image_starts(segments, ids), budget, images_per_row)
    parts = _cut_evenly(_units(segments, ids), fits, len(parts)) or parts
    return _give_labels(parts, segments, ids, fits)


def cut_where_full(
    segments: Sequence[IndexSegment], ids: TokenIds, budget: Budget, images_per_row: int
) -> list[Part]:
    """An image goes to the next part when tokens or vision rows run out; text, when it reaches an equal length."""
    length = stream_length(segments, ids)
    target = -(-length // -(-length // budget.S))
    parts: list[Part] = []
    start = position = first_image = image_number = 0
    open_rows: list[list[int]] = []

    def cut(at: int) -> None:
        nonlocal start, first_image, open_rows
        parts.append(Part(start, at, first_image, image_number))
        start, first_image, open_rows = at, image_number, []

    for tokens, patches in _units(segments, ids):
        if patches:
            rows = place_in_rows(open_rows, patches, budget, images_per_row)
            if rows is None or position + tokens - start > budget.S:
                cut(position)
                rows = place_in_rows([], patches, budget, images_per_row)
                assert rows is not None, "one image fits an empty pack, checked by the caller"
            open_rows, image_number = rows, image_number + 1
            position += tokens
            continue
        while position + tokens - start > (budget.S if length <= budget.S else target):
            step = max(0, target - (position - start))
            position, tokens = position + step, tokens - step
            cut(position)
        position += tokens
    cut(position)
    return parts


@dataclass(frozen=True, slots=True)
class _Fits:
    """What a part of one sample holds and whether it fits a pack. `begins`: position of each image's begin token."""

    patches: list[int]
    begins: list[int]
    budget: Budget
    images_per_row: int

    def part(self, start: int, end: int) -> Part:
        return Part(start, end, bisect_left(self.begins, start), bisect_left(self.begins, end))

    def __call__(self, part: Part) -> bool:
        rows: list[list[int]] | None = []
        for patches in self.patches[part.first_image : part.last_image]:
            if rows is not None:
                rows = place_in_rows(rows, patches, self.budget, self.images_per_row)
        return rows is not None and part.end - part.start <= self.budget.S


def _cut_evenly(units: Sequence[tuple[int, int]], fits: _Fits, most: int) -> list[Part] | None:
    """As few parts as fit, equal in tokens / S + patches / (N * L); None where none of up to `most` do.

    An image goes to the part that holds its middle.
    """
    S, vision = fits.budget.S, fits.budget.N * fits.budget.L
    positions = [0, *accumulate(tokens for tokens, _ in units)]
    shares = [0, *accumulate(tokens * vision + patches * S for tokens, patches in units)]

    def cut_at(share: int) -> int:
        number = bisect_right(shares, share) - 1
        tokens, patches = units[number]
        if patches:
            return positions[number + (2 * share >= shares[number] + shares[number + 1])]
        return positions[number] + min(tokens, (share - shares[number] + vision // 2) // vision)

    fewest = max(2, -(-positions[-1] // S), -(-sum(fits.patches) // vision))
    for count in range(fewest, most + 1):
        cuts = sorted({0, positions[-1], *(cut_at(shares[-1] * n // count) for n in range(1, count))})
        parts = [fits.part(start, end) for start, end in pairwise(cuts)]
        if all(map(fits, parts)):
            return parts
    return None


def _give_labels(
    parts: Sequence[Part], segments: Sequence[IndexSegment], ids: TokenIds, fits: _Fits
) -> list[Part]:
    """Move the cut before a part without labels, such as one of <eos> alone: nothing would be learned from it.

    It joins the part before it, or takes that one's last label if that is not its only one.
    """
    texts = [np.full(segment.tokens, ids.eos, np.int32) for segment in segments if segment.kind == TEXT]
    learned = np.flatnonzero(token_stream(segments, texts, ids)[1] != IGNORE_LABEL)
    image_tokens = [segment.tokens for segment in segments if segment.kind != TEXT]

    def has_labels(start: int, end: int) -> bool:
        first, last = np.searchsorted(learned, (start, end))
        return bool(first < last)

    given = [parts[0]]
    for part in parts[1:]:
        given.append(part)
        before = given[-2]
        if has_labels(part.start, part.end):
            continue
        if fits(joined := fits.part(before.start, part.end)):
            given[-2:] = [joined]
        elif has_labels(before.start, part.start):
            at = int(learned[np.searchsorted(learned, part.start) - 1])
            number = bisect_right(fits.begins, at) - 1
            if number >= 0 and at < fits.begins[number] + image_tokens[number]:
                at = fits.begins[number]  # its end token has the label
            if has_labels(before.start, at) and fits(moved := fits.part(at, part.end)):
                given[-2:] = [fits.part(before.start, at), moved]
    return given


def place_in_rows(
    rows: list[list[int]], patches: int, budget: Budget, images_per_row: int
) -> list[list[int]] | None:
    """Put an image into the fullest vision row that takes it; `rows` lists the images of each row.

    None when no row does and all N rows are in use.
    """
    fitting = [
        number
        for number, row in enumerate(rows)
        if sum(row) + patches <= budget.L and (not images_per_row or len(row) < images_per_row)
    ]
    if fitting:
        best = max(fitting, key=lambda number: sum(rows[number]))
        return [row + [patches] if number == best else row for number, row in enumerate(rows)]
    return [*rows, [patches]] if len(rows) < budget.N else None


def _units(segments: Sequence[IndexSegment], ids: TokenIds) -> list[tuple[int, int]]:
    """(tokens, patches) of what the stream is made of, with begin and end of text as text."""
    units = [(1, 0)] if ids.bos is not None else []
    units += [(segment.tokens, segment.patches) for segment in segments]
    return [*units, (1, 0)]
