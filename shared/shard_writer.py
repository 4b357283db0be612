"""Write packs into one shard whose physical layout the reader can map.

Pages of the mapped columns are PLAIN, uncompressed, without dictionary, one per row group, so that the values
of a column chunk lie in the file one after another. Pyarrow decides page borders by size and by row count:
both limits are set beyond what a row group can hold here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shared.errors import UserError
from shared.schema import IMAGE_DTYPE, MAPPED_COLUMNS, TOKEN_COLUMNS, Document, Pack, shard_schema

# About 64 MiB of payload per row group: large enough for one sequential read, small enough to buffer.
ROW_GROUP_BYTES = 64 << 20
# Below pyarrow's limit of 20,000 rows per page, whatever the bytes.
ROW_GROUP_PACKS = 16_384
# A value's length is an int32.
MAX_BLOB_BYTES = 1 << 31
# A page header counts bytes as int32; a row group stays far below unless one pack alone is larger.
PAGE_BYTES = 1 << 30


class ShardWriter:
    """Append packs, then `close()`. The caller gives a temporary path and renames it (shared.files).

    The patches of a row group are gathered in one buffer, which serves all row groups: fresh memory costs more than
    what is written to it.

    Raises:
        ValueError: a pack does not have S tokens, or its arrays are not int32 / uint8 and contiguous.
        UserError: a pack's patches are more than one Parquet value holds.
    """

    def __init__(self, path: Path, num_tokens_per_pack: int, fingerprint: str) -> None:
        self._schema = shard_schema(num_tokens_per_pack, fingerprint)
        self._num_tokens_per_pack = num_tokens_per_pack
        leaves = _leaf_paths(self._schema)
        self._writer = pq.ParquetWriter(
            path,
            self._schema,
            compression=cast(Any, {leaf: "NONE" if leaf in MAPPED_COLUMNS else "ZSTD" for leaf in leaves}),
            use_dictionary=cast(Any, ["documents.list.element.source"]),
            write_statistics=False,
            data_page_size=PAGE_BYTES,
            data_page_version="1.0",
            write_page_checksum=True,
            store_schema=True,
        )
        self._packs: list[Pack] = []
        self._checksums: list[int] = []
        self._documents: list[Sequence[Document]] = []
        self._bytes = 0
        # The last pack of a row group reaches beyond its size; memory that nobody writes to takes none.
        self._patches = np.empty(2 * ROW_GROUP_BYTES, np.uint8)
        self._ends = [0]
        self.num_packs = 0

    def room(self, num_bytes: int) -> np.ndarray:
        """The place of the next pack's patches, uint8 [num_bytes]: what is written there, `append` need not copy."""
        start = self._ends[-1]
        if start + num_bytes > len(self._patches):
            patches = np.empty(start + num_bytes, np.uint8)
            patches[:start] = self._patches[:start]
            self._patches = patches
        return self._patches[start : start + num_bytes]

    def append(self, pack: Pack, documents: Sequence[Document]) -> None:
        for name in TOKEN_COLUMNS:
            array = getattr(pack, f"{name}_S")
            if array.shape != (self._num_tokens_per_pack,) or array.dtype != np.int32:
                raise ValueError(
                    f"pack {self.num_packs}: {name} is {array.dtype}{list(array.shape)}, "
                    f"expected int32[{self._num_tokens_per_pack}]"
                )
        if pack.stored.dtype != np.uint8 or not pack.stored.flags.c_contiguous:
            raise ValueError(f"pack {self.num_packs}: patches must be contiguous uint8")
        if int(pack.images["nbytes"].sum()) != pack.stored.nbytes:
            raise ValueError(
                f"pack {self.num_packs}: images claim {int(pack.images['nbytes'].sum())} bytes, "
                f"the patch blob has {pack.stored.nbytes}"
            )
        if pack.stored.nbytes >= MAX_BLOB_BYTES:  # noise may grow by a little where it is compressed
            raise UserError(
                f"pack {self.num_packs}: its patches take {pack.stored.nbytes} bytes, a Parquet value holds less "
                f"than {MAX_BLOB_BYTES}; lower budget.N or budget.L"
            )
        room = self.room(pack.stored.nbytes)
        if room.ctypes.data != pack.stored.ctypes.data:
            room[:] = pack.stored.reshape(-1)
        self._ends.append(self._ends[-1] + room.nbytes)
        self._checksums.append(pack.checksum())  # while its bytes are in the processor's cache
        self._packs.append(replace(pack, stored=room[:0]))  # theirs may go
        self._documents.append(documents)
        self._bytes += 12 * self._num_tokens_per_pack + room.nbytes
        self.num_packs += 1
        if self._bytes >= ROW_GROUP_BYTES or len(self._packs) >= ROW_GROUP_PACKS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if not self._packs:
            return
        columns = [_fixed_column([getattr(p, f"{name}_S") for p in self._packs]) for name in TOKEN_COLUMNS]
        columns += [
            _binary_column(self._patches, self._ends),
            _images_column(self._packs, self._schema.field("images").type),
            _documents_column(self._documents, self._schema.field("documents").type),
            pa.array([p.cost for p in self._packs], pa.int64()),
            pa.array(self._checksums, pa.uint64()),
        ]
        table = pa.Table.from_arrays(columns, schema=self._schema)
        self._writer.write_table(table, row_group_size=len(self._packs))
        self._packs, self._checksums, self._documents, self._bytes, self._ends = [], [], [], 0, [0]


def _leaf_paths(schema: pa.Schema) -> list[str]:
    leaves: list[str] = []
    for field in schema:
        if pa.types.is_list(field.type):
            struct = field.type.value_type
            leaves += [f"{field.name}.list.element.{struct.field(i).name}" for i in range(struct.num_fields)]
        else:
            leaves.append(field.name)
    return leaves


def _fixed_column(rows: list[np.ndarray]) -> pa.Array:
    values = np.ascontiguousarray(np.stack(rows), dtype="<i4")
    kind = pa.binary(4 * values.shape[1])
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(rows), [None, pa.py_buffer(values)])


def _binary_column(data: np.ndarray, ends: Sequence[int]) -> pa.Array:
    buffers = [None, pa.py_buffer(np.array(ends, np.int64)), pa.py_buffer(data[: ends[-1]])]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(ends) - 1, buffers)


def _list_column(kind: pa.DataType, lengths: list[int], children: list[pa.Array]) -> pa.Array:
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    struct = pa.StructArray.from_arrays(children, fields=list(kind.value_type))
    return pa.ListArray.from_arrays(pa.array(offsets), struct, type=kind)


def _images_column(packs: list[Pack], kind: pa.DataType) -> pa.Array:
    images = np.concatenate([p.images for p in packs])
    children = [pa.array(np.ascontiguousarray(images[name])) for name in IMAGE_DTYPE.names or ()]
    return _list_column(kind, [len(p.images) for p in packs], children)


def _documents_column(documents: list[Sequence[Document]], kind: pa.DataType) -> pa.Array:
    rows = [document for of_pack in documents for document in of_pack]
    children = [
        pa.array([row.start for row in rows], pa.int32()),
        pa.array([row.length for row in rows], pa.int32()),
        pa.array([row.source for row in rows], pa.string()).dictionary_encode(),
        pa.array([row.key for row in rows], pa.string()),
        pa.array([row.part for row in rows], pa.int32()),
    ]
    return _list_column(kind, [len(of_pack) for of_pack in documents], children)
