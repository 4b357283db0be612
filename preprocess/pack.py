"""Pack: one plan file -> one finished shard. The only pass that decodes pixels.

    piece -> tokens of the scan           ->  tokens, labels, positions
          -> read -> decode -> resize     ->  vision rows, one copy into the pack's blob

A shard is a pure function of its plan, the inputs and the config: same bytes with any executor, any number of
workers, after any interruption. A picture that cannot be decoded costs its piece or itself, as its source has it;
the pack closes the gap.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from preprocess.config import CostConfig, ImageConfig, ImageLimits, VideoConfig
from preprocess.cost import pack_cost
from preprocess.faults import NO_ITEM, begin
from preprocess.images import ImageError, load_image
from preprocess.index import media_file, token_file
from preprocess.inputs import Read, change_time, read_ahead
from preprocess.plan import read_shard_plan
from preprocess.samples import NO_LABELS, STORE, TEXT, VIDEO, IndexSegment, Place, Reject
from preprocess.stream import image_starts, token_stream
from preprocess.video import load_video
from shared.codecs import ImageEncoder, image_encoder, store_patches
from shared.errors import UserError
from shared.files import atomic_path, file_checksum, write_json
from shared.geometry import Budget, Geometry, row_offsets, write_patches
from shared.remote import is_remote
from shared.schema import IGNORE_LABEL, IMAGE_DTYPE, Document, Pack
from shared.shard_writer import ShardWriter
from shared.tokens import TokenIds, Tokens

# A video may take this many times longer than a picture.
VIDEO_PATIENCE = 10.0


@dataclass(frozen=True, slots=True)
class PackTask:
    """Everything one pack task needs: it is pickled to the worker."""

    # The plan file of a window, and the shard's row group in it.
    plan: Path
    row_group: int
    output: Path
    result: Path
    index: Path
    # By source: what a picture costs that cannot be decoded.
    bad_media: dict[str, Literal["reject", "drop"]]
    ids: TokenIds
    budget: Budget
    geometry: Geometry
    limits: ImageLimits
    images: ImageConfig
    video: VideoConfig
    cost: CostConfig
    fingerprint: str
    codec: str
    codec_settings: dict[str, int]
    # Relative raw paths of the plan are below this directory, whatever the worker's own is.
    directory: str
    # Hash of what the plan was made from; the result carries it.
    identity: str
    # What to leave out (`preprocess.faults`): pictures and videos, numbered through the shard.
    crashed: dict[int, str] = field(default_factory=dict[int, str])

    def __str__(self) -> str:
        return str(self.output)

    def place_of(self, piece: Piece, segment: IndexSegment) -> Place:
        """Where a text's tokens or a picture's bytes lie."""
        tokens, media = _stores(self.index, piece.index)
        if segment.kind == TEXT:
            return Place(tokens, 4 * segment.offset, 4 * segment.tokens)
        file = media if segment.file == STORE else segment.file
        if not is_remote(file):
            file = os.path.join(self.directory, file)
        return Place(file, segment.offset, segment.size)

    def places(self, pieces: Sequence[Piece]) -> list[Place]:
        """All that a pack of these pieces reads."""
        return [self.place_of(piece, segment) for piece in pieces for segment in piece.segments]


@lru_cache(maxsize=4096)
def _stores(index: Path, unit: str) -> tuple[str, str]:
    """The files of a unit's tokens and of its pictures without a place."""
    return str(token_file(index / unit)), str(media_file(index / unit))


@dataclass(frozen=True, slots=True)
class Piece:
    """One row of a plan file."""

    source: str
    index: str
    unit: str
    key: str
    row: int
    copy: int
    part: int
    parts: int
    start: int
    end: int
    length: int
    first_image: int
    rows: list[int]
    segments: list[IndexSegment]


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """A resized picture uint8 [T, h*p, w*p, 3] and its vision row."""

    frames_thwc: npt.NDArray[np.uint8]
    row: int
    t: int
    h: int
    w: int

    @property
    def patches(self) -> int:
        return self.t * self.h * self.w


@dataclass(frozen=True, slots=True)
class PackedPiece:
    """`image_starts`: where the visual tokens of each image begin in the piece."""

    piece: Piece
    tokens: Tokens
    labels: Tokens
    images: list[LoadedImage]
    image_starts: list[int]


def pack_shard(task: PackTask) -> int:
    """Write the shard and then its result file; return the number of packs.

    The result file (JSON) holds what the account needs: pieces packed per source, and rejects. It comes last, so that
    no result ever stands beside a shard of an earlier plan.

    Raises:
        UserError: an input is gone or has changed since the scan.
    """
    rejects: list[dict[str, Any]] = []
    packed: dict[str, dict[str, int]] = {name: {"whole": 0, "parts": 0} for name in task.bad_media}
    totals = {"tokens": 0, "labels": 0, "patches": 0, "images": 0, "documents": 0}
    with atomic_path(task.output) as temporary:
        writer = ShardWriter(temporary, task.budget.S, task.fingerprint)
        encode = image_encoder(task.codec, task.geometry, **task.codec_settings)
        media = itertools.count()
        for pieces, read in read_ahead(_read_plan(task.plan, task.row_group), task.places):
            loaded = [_load_piece(piece, task, read, media, rejects) for piece in pieces]
            begin(NO_ITEM)
            members = [member for member in loaded if member is not None]
            if not members:
                continue
            pack, documents = _assemble(members, task, encode, writer)
            writer.append(pack, documents)
            for member in members:
                packed[member.piece.source]["whole" if member.piece.parts == 1 else "parts"] += 1
            totals["tokens"] += sum(document.length for document in documents)
            totals["labels"] += int((pack.labels_S != IGNORE_LABEL).sum())
            totals["patches"] += pack.num_patches
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


def _read_plan(path: Path, row_group: int) -> Iterator[list[Piece]]:
    """The pieces of each pack, in order."""
    rows = read_shard_plan(path, row_group).to_pylist()
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


def _load_piece(
    piece: Piece, task: PackTask, read: Read, media: Iterator[int], rejects: list[dict[str, Any]]
) -> PackedPiece | None:
    """Tokens and resized pictures of a piece; what is lost of it is added to `rejects`.

    `media` numbers the pictures of the shard.
    """
    segments: list[IndexSegment] = []
    texts: list[Tokens] = []
    images: list[LoadedImage] = []
    dropped: list[Reject] = []
    number = -1
    part = -1 if piece.parts == 1 else piece.part
    origin = {"unit": piece.unit, "row": piece.row, "copy": piece.copy, "parts": piece.parts}
    for segment in piece.segments:
        begin(NO_ITEM)  # a store may take its time
        if segment.kind == TEXT:
            texts.append(np.frombuffer(read(task.place_of(piece, segment)), "<i4"))
            segments.append(segment)
            continue
        number += 1
        try:
            frames = _load_frames(piece, segment, task, read, next(media))
        except ImageError as error:
            lost = piece.first_image + number
            dropped.append(Reject(piece.source, piece.key, error.reason, str(error), part, lost))
            if task.bad_media[piece.source] == "reject":
                break
            continue
        images.append(LoadedImage(frames, piece.rows[number], segment.t, segment.h, segment.w))
        segments.append(segment)
    # A text may be there as the last label alone: then nothing is left of the piece.
    gone = sum(s.tokens for s in piece.segments) - sum(s.tokens for s in segments)
    empty = not segments or gone == piece.end - piece.start
    failed = dropped[-1] if dropped and (task.bad_media[piece.source] == "reject" or empty) else None
    if failed is None:
        packed = _packed_piece(piece, segments, texts, images, task.ids)
        if (packed.labels != IGNORE_LABEL).any():
            rejects += [{**asdict(reject), **origin} for reject in dropped]
            return packed
        detail = f"{len(packed.tokens)} tokens, none of which is learned"
        failed = dropped[-1] if dropped else Reject(piece.source, piece.key, NO_LABELS, detail, part)
    rejects.append({**asdict(replace(failed, media=-1)), **origin})
    return None


def _packed_piece(
    piece: Piece,
    segments: Sequence[IndexSegment],
    texts: Sequence[Tokens],
    images: list[LoadedImage],
    ids: TokenIds,
) -> PackedPiece:
    """`segments` are those of the piece that could be loaded."""
    # The end of text is in the last part; where that holds nothing else, it is the last label of the part before.
    first, last = piece.start == 0, piece.end >= piece.length - 1
    tokens, labels = token_stream(segments, texts, ids, first=first, last=last)
    lost = sum(s.tokens for s in piece.segments) - sum(s.tokens for s in segments)
    length = piece.end - piece.start - lost  # behind it there may be one token more, the last label
    starts = image_starts(segments, ids if first else replace(ids, bos=None))
    return PackedPiece(piece, tokens[:length], labels[:length], images, [start + 1 for start in starts])


def _load_frames(
    piece: Piece, segment: IndexSegment, task: PackTask, read: Read, number: int
) -> npt.NDArray[np.uint8]:
    """uint8 [t * pt, h * p, w * p, 3]: a still picture fills all frames of its temporal patch.

    Raises:
        ImageError: it cannot be decoded, or killed a worker.
        UserError: it is a file of its own that is gone or has changed since the scan.
    """
    if detail := task.crashed.get(number):
        raise ImageError("crashed", detail)
    place = task.place_of(piece, segment)
    if segment.state and change_time(place.file) != segment.state:
        raise UserError(
            f"{place.file} has changed since the scan; delete index/{piece.index}, plan/ and shards/ in the output "
            f"and run again, or put it back"
        )
    data = read(place)
    size = (segment.height, segment.width)
    if segment.kind == VIDEO:
        begin(number, VIDEO_PATIENCE)
        return load_video(
            data,
            size=size,
            grid=(segment.t, segment.h, segment.w),
            geometry=task.geometry,
            limits=task.limits,
            config=task.video,
            background=task.images.background_rgb,
        )
    begin(number)
    frame = load_image(
        data,
        size=size,
        grid=(segment.h, segment.w),
        geometry=task.geometry,
        limits=task.limits,
        config=task.images,
    )
    return np.broadcast_to(frame, (task.geometry.temporal_patch_size, *frame.shape))


def _assemble(
    members: Sequence[PackedPiece], task: PackTask, encode: ImageEncoder | None, writer: ShardWriter
) -> tuple[Pack, list[Document]]:
    budget = task.budget
    tokens_S = np.full(budget.S, task.ids.pad, np.int32)
    labels_S = np.full(budget.S, IGNORE_LABEL, np.int32)
    positions_S = np.empty(budget.S, np.int32)
    documents: list[Document] = []
    images: list[tuple[LoadedImage, int]] = []
    start = 0
    for member in members:
        piece, length = member.piece, len(member.tokens)
        here = slice(start, start + length)
        tokens_S[here], labels_S[here] = member.tokens, member.labels
        positions_S[here] = np.arange(length)
        documents.append(Document(start, length, piece.source, piece.key, piece.part))
        images += [
            (image, start + place) for image, place in zip(member.images, member.image_starts, strict=True)
        ]
        start += length
    positions_S[start:] = np.arange(budget.S - start)
    images.sort(key=lambda placed: placed[0].row)  # stable: document order inside a row
    table, patches_XP = _assemble_vision(images, task.geometry, writer)
    stored = store_patches(patches_XP, table, encode)
    lengths = [document.length for document in documents]
    # Attention is inside a frame.
    frames = (image.h * image.w for image, _ in images for _ in range(image.t))
    cost = pack_cost(lengths, frames, task.cost)
    return Pack(tokens_S, labels_S, positions_S, stored, table, cost), documents


def _assemble_vision(
    images: Sequence[tuple[LoadedImage, int]], geometry: Geometry, writer: ShardWriter
) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8]]:
    """The images column and the patch blob uint8 [valid patches, P]; every patch is copied once, to its place."""
    table = np.zeros(len(images), IMAGE_DTYPE)
    for column, values in (
        ("token_start", [start for _, start in images]),
        *((name, [getattr(image, name) for image, _ in images]) for name in ("row", "t", "h", "w")),
    ):
        table[column] = values
    patches = np.array([image.patches for image, _ in images], np.int64)
    table["offset"] = row_offsets(table["row"], patches)
    shape = (int(patches.sum()), geometry.values_per_patch)
    patches_XP = writer.room(shape[0] * shape[1]).reshape(shape)
    start = 0
    for image, _ in images:
        write_patches(image.frames_thwc, geometry, patches_XP[start : start + image.patches])
        start += image.patches
    return table, patches_XP
