"""The shard format, version 1: one Parquet row per pack.

| column                      | Parquet type              | content                                            |
|-----------------------------|---------------------------|----------------------------------------------------|
| tokens, labels, positions   | fixed_size_binary(4*S)    | int32 little-endian; padding: pad id, -100, 0..k   |
| patches                     | large_binary              | codec raw: uint8 [valid patches, P], rows in order |
|                             |                           | others: one frame per image, see `codecs`          |
| images                      | list<struct>              | place of each image, in patch-blob order           |
| documents                   | list<struct>              | which sample each token came from                  |
| cost                        | int64                     | modelled FLOPs of the pack                         |
| checksum                    | uint64                    | xxh3 of tokens, labels, positions, patches         |

Writer (`shard_writer`) and reader (`shard_reader`) share this module and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from shared.codecs import FrameError, ImageDecoder
from shared.errors import UserError

FORMAT_VERSION = 1
METADATA_VERSION = b"parquetry.format_version"
METADATA_FINGERPRINT = b"parquetry.fingerprint"
IGNORE_LABEL = -100

# Stored uncompressed, PLAIN, without a dictionary and as one page per row group: the mapped columns.
TOKEN_COLUMNS = ("tokens", "labels", "positions")
MAPPED_COLUMNS = (*TOKEN_COLUMNS, "patches")

IMAGE_DTYPE = np.dtype(
    [
        ("token_start", "<i4"),  # position of the image's first visual token in the pack
        ("row", "<i4"),  # vision row
        ("offset", "<i4"),  # first patch inside the row, a multiple of m * m
        ("t", "<i4"),  # size in patches
        ("h", "<i4"),
        ("w", "<i4"),
        ("nbytes", "<i8"),  # bytes in the patch column
    ]
)

# Which tokens of a pack come from which source, by its number in a table of names.
SPAN_DTYPE = np.dtype([("start", "<i4"), ("length", "<i4"), ("source", "<i4")])


@dataclass(frozen=True, slots=True)
class Document:
    """Tokens [start, start + length) of a pack are part `part` of the sample `key` of `source`."""

    start: int
    length: int
    source: str
    key: str
    part: int


@dataclass(frozen=True, slots=True)
class Pack:
    """One training sequence with its vision rows; arrays may be views of a mapped file.

    tokens_S, labels_S, positions_S: int32 [S]; images: IMAGE_DTYPE [images], in the order of the patch column;
    stored: what the patch column holds, uint8 [valid patches, P] where `decoder` is None (codec raw), else
    uint8 [bytes], one frame per image.
    """

    tokens_S: npt.NDArray[np.int32]
    labels_S: npt.NDArray[np.int32]
    positions_S: npt.NDArray[np.int32]
    stored: npt.NDArray[np.uint8]
    images: npt.NDArray[Any]
    cost: int
    decoder: ImageDecoder | None = None
    origin: str = "a pack in memory"
    """Where it comes from, for messages."""

    @property
    def patches_i(self) -> npt.NDArray[np.int64]:
        """Patches of every image, int64 [images]."""
        return self.images["t"].astype(np.int64) * self.images["h"] * self.images["w"]

    @property
    def num_patches(self) -> int:
        return int(self.patches_i.sum())

    @property
    def patches_XP(self) -> npt.NDArray[np.uint8]:  # noqa: N802
        """All patches, uint8 [valid patches, P], vision rows in order: `stored` itself, or all frames decoded.

        Raises:
            UserError: a frame is damaged; names shard, pack and image.
        """
        if self.decoder is None:
            return self.stored
        patches_XP = np.empty((self.num_patches, self.decoder.geometry.values_per_patch), np.uint8)
        ends = np.cumsum(self.patches_i).tolist()
        for image, (start, end) in enumerate(pairwise([0, *ends])):
            self.decode_image(image, patches_XP[start:end])
        return patches_XP

    def read_image(self, image: int) -> npt.NDArray[np.uint8]:
        """Patches of one image, uint8 [t*h*w, P]: a view with codec raw, else decoded."""
        if self.decoder is None:
            return self._bytes_of(image).reshape(-1, self.stored.shape[-1])
        shape = (int(self.patches_i[image]), self.decoder.geometry.values_per_patch)
        self.decode_image(image, out := np.empty(shape, np.uint8))
        return out

    def decode_image(self, image: int, out: npt.NDArray[np.uint8]) -> None:
        """Decode one image's frame into `out`, uint8 [t*h*w, P], contiguous. Not for codec raw.

        Raises:
            UserError: the frame is damaged; names shard, pack and image.
        """
        assert self.decoder is not None, "codec raw stores patches, not frames"
        t, h, w = (int(self.images[image][name]) for name in ("t", "h", "w"))
        try:
            self.decoder(self._bytes_of(image), t, h, w, out)
        except FrameError as error:
            raise UserError(
                f"{self.origin}: image {image} is damaged: {error}; copy the shard again "
                f"(`python -m preprocess verify` finds everything that is damaged)"
            ) from None

    def _bytes_of(self, image: int) -> npt.NDArray[np.uint8]:
        first = int(self.images["nbytes"][:image].sum())
        return self.stored.reshape(-1)[first : first + int(self.images["nbytes"][image])]

    def checksum(self) -> int:
        digest = xxhash.xxh3_64()
        for array in (self.tokens_S, self.labels_S, self.positions_S, self.stored):
            digest.update(array.data.cast("B") if array.size else b"")
        return digest.intdigest()


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


def images_type() -> pa.DataType:
    """list<struct> of IMAGE_DTYPE's fields."""
    fields = [_required(name, pa.from_numpy_dtype(IMAGE_DTYPE[name])) for name in IMAGE_DTYPE.names or ()]
    return pa.list_(_required("element", pa.struct(fields)))


def documents_type() -> pa.DataType:
    fields = [
        _required("start", pa.int32()),
        _required("length", pa.int32()),
        _required("source", pa.dictionary(pa.int32(), pa.string())),
        _required("key", pa.string()),
        _required("part", pa.int32()),
    ]
    return pa.list_(_required("element", pa.struct(fields)))


def shard_schema(num_tokens_per_pack: int, fingerprint: str = "") -> pa.Schema:
    """Arrow schema of a shard for S = `num_tokens_per_pack`; every field is required."""
    mapped = [_required(name, pa.binary(4 * num_tokens_per_pack)) for name in TOKEN_COLUMNS]
    return pa.schema(
        [
            *mapped,
            _required("patches", pa.large_binary()),
            _required("images", images_type()),
            _required("documents", documents_type()),
            _required("cost", pa.int64()),
            _required("checksum", pa.uint64()),
        ],
        metadata={
            METADATA_VERSION: str(FORMAT_VERSION).encode(),
            METADATA_FINGERPRINT: fingerprint.encode(),
        },
    )
