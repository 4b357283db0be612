"""Pack: one plan file -> one finished shard. The only pass that decodes pixels.

    piece -> read -> tokenize -> slice of the stream   ->  tokens, labels, positions
                  -> decode -> resize -> patchify      ->  vision rows, one copy into the pack's blob

A shard is a pure function of its plan, the inputs and the config: same bytes with any executor, any number of
workers, after any interruption. A picture that cannot be decoded rejects its piece; the pack closes the gap.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from preprocess.config import CostConfig, ImageLimits, SourceConfig
from preprocess.cost import pack_cost
from preprocess.images import ImageError, decode, resize
from preprocess.plan import PLAN_SCHEMA
from preprocess.samples import IMAGE, TEXT, IndexSegment, Reject, Source
from preprocess.scan import cached_tokenizer
from preprocess.sources import open_source
from preprocess.stream import Tokens, image_starts, stream_length, token_stream
from shared.errors import UserError
from shared.files import atomic_path, file_checksum, write_json
from shared.geometry import Budget, Geometry, patchify, row_offsets
from shared.schema import IGNORE_LABEL, IMAGE_DTYPE, Document, Pack
from shared.shard_writer import ShardWriter
from shared.tables import read_table
from shared.tokens import TokenNames


@dataclass(frozen=True, slots=True)
class PackTask:
    """Everything one pack task needs: it is pickled to the worker."""

    plan: Path
    output: Path
    result: Path
    sources: dict[str, SourceConfig]
    tokenizer: Path
    tokens: TokenNames
    budget: Budget
    geometry: Geometry
    limits: ImageLimits
    cost: CostConfig
    fingerprint: str
    # Relative raw paths of the plan are below this directory, whatever the worker's own is.
    directory: str
    # Hash of what the plan was made from; the result carries it.
    identity: str

    def __str__(self) -> str:
        return str(self.output)

    def unit_path(self, unit: str) -> str:
        return os.path.join(self.directory, unit)


@dataclass(frozen=True, slots=True)
class Piece:
    """One row of a plan file."""

    source: str
    unit: str
    key: str
    part: int
    parts: int
    start: int
    end: int
    first_image: int
    last_image: int
    rows: list[int]
    segments: list[IndexSegment]


@dataclass(frozen=True, slots=True)
class PlacedImage:
    """A resized picture uint8 [T, h*p, w*p, 3], its vision row, and where its visual tokens begin in the piece."""

    frames_thwc: npt.NDArray[np.uint8]
    token_start: int
    row: int
    t: int
    h: int
    w: int

    @property
    def patches(self) -> int:
        return self.t * self.h * self.w


@dataclass(frozen=True, slots=True)
class PackedPiece:
    piece: Piece
    tokens: Tokens
    labels: Tokens
    images: list[PlacedImage]


def pack_shard(task: PackTask) -> int:
    """Write the shard, after its result file; return the number of packs.

    The result file (JSON) holds what the account needs: pieces packed per source, and rejects.

    Raises:
        UserError: an input is gone or has changed since the scan.
    """
    rejects: list[dict[str, Any]] = []
    packed: dict[str, dict[str, int]] = {name: {"whole": 0, "parts": 0} for name in task.sources}
    totals = {"tokens": 0, "labels": 0, "patches": 0, "images": 0, "documents": 0}
    with atomic_path(task.output) as temporary:
        writer = ShardWriter(temporary, task.budget.S, task.fingerprint)
        # Once per shard: a config may list a hundred thousand paths.
        sources = {name: open_source(name, config) for name, config in task.sources.items()}
        for pieces in _read_plan(task.plan):
            members, failed = _load_pieces(pieces, sources, task)
            rejects += failed
            if not members:
                continue
            pack, documents = _assemble(members, task)
            writer.append(pack, documents)
            for member in members:
                packed[member.piece.source]["whole" if member.piece.parts == 1 else "parts"] += 1
            totals["tokens"] += sum(document.length for document in documents)
            totals["labels"] += int((pack.labels_S != IGNORE_LABEL).sum())
            totals["patches"] += len(pack.patches_XP)
            totals["images"] += len(pack.images)
            totals["documents"] += len(documents)
        writer.close()
        result = {
            "identity": task.identity,
            "packs": writer.num_packs,
            "bytes": temporary.stat().st_size,
            "checksum": file_checksum(temporary),
            "totals": totals,
            "packed": packed,
            "rejects": rejects,
        }
        write_json(task.result, result)
    return writer.num_packs


def _read_plan(path: Path) -> Iterator[list[Piece]]:
    """The pieces of each pack, in order."""
    mend = "delete the plan/ directory and run again, it will be planned again"
    rows = read_table(path, mend=mend, schema=PLAN_SCHEMA).to_pylist()
    current: list[Piece] = []
    number = 0
    for row in rows:
        if row["pack"] != number and current:
            yield current
            current = []
        number = row.pop("pack")
        row["segments"] = [IndexSegment(**segment) for segment in row["segments"]]
        current.append(Piece(**row))
    if current:
        yield current


def _load_pieces(
    pieces: Sequence[Piece], sources: Mapping[str, Source], task: PackTask
) -> tuple[list[PackedPiece], list[dict[str, Any]]]:
    """Tokens and resized pictures of the pieces of one pack; those with a broken picture become rejects."""
    tokenizer = cached_tokenizer(task.tokenizer, task.tokens)
    texts = [
        _read_text(piece, segment, sources[piece.source], task)
        for piece in pieces
        for segment in piece.segments
        if segment.kind == TEXT
    ]
    encoded = iter(tokenizer.encode(texts))
    members: list[PackedPiece] = []
    rejects: list[dict[str, Any]] = []
    for piece in pieces:
        own = [next(encoded) for s in piece.segments if s.kind == TEXT]
        tokens, labels = token_stream(piece.segments, own, tokenizer.ids)
        if len(tokens) != stream_length(piece.segments, tokenizer.ids):
            raise _changed_text(piece)
        try:
            starts = image_starts(piece.segments, tokenizer.ids)
            images = _load_images(piece, starts, sources[piece.source], task)
        except ImageError as error:
            part = -1 if piece.parts == 1 else piece.part
            reject = Reject(piece.source, piece.key, error.reason, str(error), part)
            rejects.append({**asdict(reject), "unit": piece.unit, "parts": piece.parts})
            continue
        here = slice(piece.start, piece.end)
        members.append(PackedPiece(piece, tokens[here], labels[here], images))
    return members, rejects


def _read_text(piece: Piece, segment: IndexSegment, source: Source, task: PackTask) -> str:
    try:
        return source.read_text(task.unit_path(piece.unit), segment.offset, segment.size)
    except UserError:
        raise
    except (ValueError, KeyError):  # the scan could read it
        raise _changed_text(piece) from None


def _changed_text(piece: Piece) -> UserError:
    return UserError(
        f"source {piece.source!r}: {piece.unit}: the text of {piece.key!r} has changed since the scan; "
        f"run again with --on_change rebuild"
    )


def _load_images(piece: Piece, starts: Sequence[int], source: Source, task: PackTask) -> list[PlacedImage]:
    images = [s for s in piece.segments if s.kind == IMAGE][piece.first_image : piece.last_image]
    begins = starts[piece.first_image : piece.last_image]
    placed: list[PlacedImage] = []
    for image, begin, row in zip(images, begins, piece.rows, strict=True):
        data = source.read_bytes(task.unit_path(piece.unit), image.offset, image.size)
        rgb = decode(data, max_pixels=task.limits.max_pixels)
        if rgb.shape[:2] != (image.height, image.width):
            raise ImageError(
                "image_corrupt",
                f"decoded to {rgb.shape[1]} x {rgb.shape[0]}, header {image.width} x {image.height}",
            )
        frame = resize(rgb, image.h, image.w, task.geometry)
        # A still picture fills all frames of its temporal patch.
        frames = np.broadcast_to(frame, (task.geometry.temporal_patch_size, *frame.shape))
        token_start = begin + 1 - piece.start
        placed.append(PlacedImage(frames, token_start, row, image.t, image.h, image.w))
    return placed


def _assemble(members: Sequence[PackedPiece], task: PackTask) -> tuple[Pack, list[Document]]:
    budget = task.budget
    tokenizer = cached_tokenizer(task.tokenizer, task.tokens)
    tokens_S = np.full(budget.S, tokenizer.ids.pad, np.int32)
    labels_S = np.full(budget.S, IGNORE_LABEL, np.int32)
    positions_S = np.empty(budget.S, np.int32)
    documents: list[Document] = []
    images: list[tuple[PlacedImage, int]] = []
    start = 0
    for member in members:
        piece, length = member.piece, len(member.tokens)
        here = slice(start, start + length)
        tokens_S[here], labels_S[here] = member.tokens, member.labels
        positions_S[here] = np.arange(length)
        documents.append(Document(start, length, piece.source, piece.key, piece.part))
        images += [(image, start + image.token_start) for image in member.images]
        start += length
    positions_S[start:] = np.arange(budget.S - start)
    images.sort(key=lambda placed: placed[0].row)  # stable: document order inside a row
    table, patches_XP = _assemble_vision(images, task.geometry)
    lengths = [document.length for document in documents]
    cost = pack_cost(lengths, (image.patches for image, _ in images), task.cost)
    return Pack(tokens_S, labels_S, positions_S, patches_XP, table, cost), documents


def _assemble_vision(
    images: Sequence[tuple[PlacedImage, int]], geometry: Geometry
) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8]]:
    """The images column and the patch blob uint8 [valid patches, P]; every patch is copied once."""
    table = np.zeros(len(images), IMAGE_DTYPE)
    for column, values in (
        ("token_start", [start for _, start in images]),
        *((name, [getattr(image, name) for image, _ in images]) for name in ("row", "t", "h", "w")),
    ):
        table[column] = values
    patches = np.array([image.patches for image, _ in images], np.int64)
    table["offset"] = row_offsets(table["row"], patches)
    table["nbytes"] = patches * geometry.values_per_patch
    patches_XP = np.empty((int(patches.sum()), geometry.values_per_patch), np.uint8)
    begin = 0
    for image, _ in images:
        view = patchify(image.frames_thwc, geometry)
        patches_XP[begin : begin + image.patches].reshape(view.shape)[...] = view
        begin += image.patches
    return table, patches_XP
