"""The shard format, version 1: one Parquet row per pack.

| column                      | Parquet type              | content                                            |
|-----------------------------|---------------------------|----------------------------------------------------|
| tokens, labels, positions   | fixed_size_binary(4*S)    | int32 little-endian; padding: pad id, -100, 0..k   |
| patches                     | large_binary              | codec raw: uint8 [valid patches, P], rows in order |
| images                      | list<struct>              | place of each image, in patch-blob order           |
| documents                   | list<struct>              | which sample each token came from                  |
| cost                        | int64                     | modelled FLOPs of the pack                         |
| checksum                    | uint64                    | xxh3 of tokens, labels, positions, patches         |

Writer (`shard_writer`) and reader (`shard_reader`) share this module and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

FORMAT_VERSION = 1
METADATA_VERSION = b"parquetry.format_version"
METADATA_FINGERPRINT = b"parquetry.fingerprint"
CODECS = ("raw",)
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
        ("nbytes", "<i8"),  # bytes in the patch blob
    ]
)


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

    tokens_S, labels_S, positions_S: int32 [S]; patches_XP: uint8 [valid patches, P], vision rows in order;
    images: IMAGE_DTYPE [images], in patch-blob order.
    """

    tokens_S: npt.NDArray[np.int32]
    labels_S: npt.NDArray[np.int32]
    positions_S: npt.NDArray[np.int32]
    patches_XP: npt.NDArray[np.uint8]
    images: npt.NDArray[Any]
    cost: int

    def checksum(self) -> int:
        digest = xxhash.xxh3_64()
        for array in (self.tokens_S, self.labels_S, self.positions_S, self.patches_XP):
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
