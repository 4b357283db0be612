"""Map a shard and view its packs without copying or decoding; frames are decoded where pixels are asked for.

    footer (ordinary Parquet metadata) -> where each column chunk lies
    chunk of k values: [page header][value 0][value 1]..        fixed width: 4*S bytes each
                       [page header][len|blob 0][len|blob 1]..  patches: 4-byte length before each blob
    `images` column -> how long each blob is -> where every pack's patches begin

Opening costs the footer and the small columns of the shard; a pack costs nothing until its bytes are touched.
The layout is proven at opening (codec, encoding, one page per chunk, blob lengths); a shard that another tool
has rewritten is still good Parquet, but it is refused here with the reason.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from shared.codecs import ImageDecoder
from shared.errors import UserError
from shared.page_header import DATA_PAGE, PLAIN, read_page_header
from shared.schema import (
    FORMAT_VERSION,
    IMAGE_DTYPE,
    MAPPED_COLUMNS,
    METADATA_FINGERPRINT,
    METADATA_VERSION,
    SPAN_DTYPE,
    TOKEN_COLUMNS,
    Document,
    Pack,
    shard_schema,
)


@dataclass(frozen=True, slots=True)
class _Index:
    """Where each pack's payloads begin in the file, and its small columns."""

    token_offsets: npt.NDArray[np.int64]  # [columns, packs]
    blob_offsets: npt.NDArray[np.int64]  # [packs]
    blob_bytes: npt.NDArray[np.int64]  # [packs]
    images: npt.NDArray[Any]  # IMAGE_DTYPE, of all packs
    image_offsets: npt.NDArray[np.int64]  # [packs + 1]
    costs: npt.NDArray[np.int64]
    checksums: npt.NDArray[np.uint64]


class ShardReader:
    """Random access to the packs of one shard.

    Args:
        path: the Parquet file.
        values_per_patch: P; the blob of a pack is viewed as uint8 [valid patches, P] where it is not encoded.
        decoder: decodes the frames of codecs other than raw; the packs carry it, nothing is decoded here.

    Raises:
        UserError: the file is not a shard of this format version, or its layout cannot be mapped; the
            message says which column and why.
    """

    def __init__(self, path: Path, values_per_patch: int, decoder: ImageDecoder | None = None) -> None:
        self.path = path
        self._values_per_patch, self._decoder = values_per_patch, decoder
        self._metadata = _read_footer(path)
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.num_tokens_per_pack = _check_schema(path, self._metadata)
        self._index = self._build_index()

    def __len__(self) -> int:
        return self._metadata.num_rows

    @property
    def fingerprint(self) -> str:
        return self._metadata.metadata[METADATA_FINGERPRINT].decode()

    @property
    def costs(self) -> npt.NDArray[np.int64]:
        """Modelled FLOPs of every pack, int64 [packs]."""
        return self._index.costs

    def images(self, row: int) -> npt.NDArray[Any]:
        """IMAGE_DTYPE [images] of one pack, in patch-blob order."""
        index = self._index
        return index.images[index.image_offsets[row] : index.image_offsets[row + 1]]

    def pack(self, row: int) -> Pack:
        """Views of one pack; the arrays stay valid as long as they live, also after this reader is gone."""
        index = self._index
        tokens, labels, positions = (
            np.frombuffer(self._map, "<i4", self.num_tokens_per_pack, int(index.token_offsets[column, row]))
            for column in range(len(TOKEN_COLUMNS))
        )
        blob = np.frombuffer(self._map, np.uint8, int(index.blob_bytes[row]), int(index.blob_offsets[row]))
        return Pack(
            tokens_S=tokens,
            labels_S=labels,
            positions_S=positions,
            stored=blob.reshape(-1, self._values_per_patch) if self._decoder is None else blob,
            images=self.images(row),
            cost=int(index.costs[row]),
            decoder=self._decoder,
            origin=f"shard {self.path}: pack {row}",
        )

    def byte_ranges(self, row: int) -> dict[str, range]:
        """Where the mapped columns of one pack lie in the file: any tool can read them from there."""
        index, width = self._index, 4 * self.num_tokens_per_pack
        starts = {name: int(index.token_offsets[column, row]) for column, name in enumerate(TOKEN_COLUMNS)}
        blob = int(index.blob_offsets[row])
        return {
            **{name: range(start, start + width) for name, start in starts.items()},
            "patches": range(blob, blob + int(index.blob_bytes[row])),
        }

    def documents(self, row: int) -> list[Document]:
        """Provenance of one pack. Decodes the column once per shard, on first use."""
        return [Document(**entry) for entry in self._documents[row].as_py()]

    def document_spans(self, row: int) -> npt.NDArray[Any]:
        """SPAN_DTYPE [documents] of one pack; `source` is a number in `sources`. Read once per shard, without keys."""
        offsets, spans, _ = self._spans
        return spans[offsets[row] : offsets[row + 1]]

    @property
    def sources(self) -> list[str]:
        """Names of the sources that this shard holds documents of."""
        return self._spans[2]

    def damage(self, row: int) -> str | None:
        """None when the pack's bytes are those that were written, else what differs."""
        found, stored = self.pack(row).checksum(), int(self._index.checksums[row])
        return None if found == stored else f"checksum is {found:016x}, expected {stored:016x}"

    @cached_property
    def _documents(self) -> pa.ChunkedArray:
        return _read_columns(self.path, ["documents"]).column("documents")

    @cached_property
    def _spans(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any], list[str]]:
        """Where each pack's spans begin [packs + 1], the spans of all packs, and the names of the sources."""
        fields = [f"documents.list.element.{name}" for name in SPAN_DTYPE.names or ()]
        numbers: dict[str, int] = {}
        counts, parts = [np.zeros(1, np.int64)], [np.empty(0, SPAN_DTYPE)]
        for lists in _read_columns(self.path, fields).column("documents").chunks:
            struct = lists.flatten()
            part = np.empty(len(struct), SPAN_DTYPE)
            for name in ("start", "length"):
                part[name] = struct.field(name).to_numpy()
            source = struct.field("source")  # every chunk has a dictionary of its own
            names = [numbers.setdefault(name, len(numbers)) for name in source.dictionary.to_pylist()]
            part["source"] = np.array(names, np.int32)[source.indices.to_numpy()]
            counts.append(np.diff(lists.offsets.to_numpy()).astype(np.int64))
            parts.append(part)
        return np.cumsum(np.concatenate(counts)), np.concatenate(parts), list(numbers)

    def _build_index(self) -> _Index:
        small = _read_columns(self.path, ["images", "cost", "checksum"])
        lists = small.column("images").combine_chunks()
        image_offsets = lists.offsets.to_numpy().astype(np.int64)
        struct = lists.flatten()
        images = np.empty(len(struct), IMAGE_DTYPE)
        for name in IMAGE_DTYPE.names or ():
            images[name] = struct.field(name).to_numpy(zero_copy_only=False)
        image_offsets -= image_offsets[0] if len(image_offsets) else 0
        ends = np.concatenate([[0], np.cumsum(images["nbytes"])])
        blob_bytes = ends[image_offsets[1:]] - ends[image_offsets[:-1]]
        if self._decoder is None and np.any(blob_bytes % self._values_per_patch):
            raise UserError(
                f"shard {self.path}: a patch blob is not a whole number of patches of "
                f"P = {self._values_per_patch} values; the data set's geometry is not this shard's"
            )
        token_offsets, blob_offsets = self._locate(blob_bytes)
        return _Index(
            token_offsets=token_offsets,
            blob_offsets=blob_offsets,
            blob_bytes=blob_bytes,
            images=images,
            image_offsets=image_offsets,
            costs=small.column("cost").to_numpy(),
            checksums=small.column("checksum").to_numpy(),
        )

    def _locate(
        self, blob_bytes: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """File offset of every pack's token arrays [3, packs] and patch blob [packs]."""
        width = 4 * self.num_tokens_per_pack
        token_offsets = np.empty((len(TOKEN_COLUMNS), len(self)), np.int64)
        blob_offsets = np.empty(len(self), np.int64)
        first = 0
        for group in range(self._metadata.num_row_groups):
            rows = self._metadata.row_group(group).num_rows
            here = slice(first, first + rows)
            for column in range(len(TOKEN_COLUMNS)):
                payload = self._payload_start(group, column, rows * width)
                token_offsets[column, here] = payload + width * np.arange(rows)
            steps = 4 + blob_bytes[here]
            payload = self._payload_start(group, MAPPED_COLUMNS.index("patches"), int(steps.sum()))
            blob_offsets[here] = payload + np.cumsum(steps) - steps + 4
            first += rows
        prefixes = self._int32_at(blob_offsets - 4)
        if not np.array_equal(prefixes, blob_bytes):
            raise self._refusal("patches", "the blob lengths differ from what the images column says")
        return token_offsets, blob_offsets

    def _payload_start(self, group: int, column: int, payload_bytes: int) -> int:
        """First byte of the values of a column chunk, after proving that they are one run of bytes."""
        chunk = self._metadata.row_group(group).column(column)
        name = chunk.path_in_schema
        if chunk.compression != "UNCOMPRESSED":
            raise self._refusal(name, f"it is compressed ({chunk.compression})")
        if chunk.has_dictionary_page:
            raise self._refusal(name, "it is dictionary-encoded")
        start = chunk.data_page_offset
        try:
            page = read_page_header(memoryview(self._map), start)
        except ValueError as error:
            raise self._refusal(name, str(error)) from None
        if page.kind != DATA_PAGE or page.encoding != PLAIN:
            raise self._refusal(name, "its first page is not a PLAIN data page (version 1)")
        if page.header_bytes + page.payload_bytes != chunk.total_compressed_size:
            raise self._refusal(name, f"row group {group} has more than one data page")
        if page.payload_bytes != payload_bytes or page.num_values != chunk.num_values:
            raise self._refusal(
                name, f"row group {group} holds {page.payload_bytes} bytes, expected {payload_bytes}"
            )
        return start + chunk.total_compressed_size - payload_bytes

    def _int32_at(self, offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        data = np.frombuffer(self._map, np.uint8)
        return data[offsets[:, None] + np.arange(4)].view("<i4").reshape(-1)

    def _refusal(self, column: str, reason: str) -> UserError:
        return UserError(
            f"shard {self.path}: column {column!r} cannot be mapped: {reason}. Another tool has rewritten the "
            f"file; restore the original or run `python -m preprocess run` again after deleting it"
        )


def _read_footer(path: Path) -> pq.FileMetaData:
    try:
        return pq.read_metadata(path)
    except FileNotFoundError:
        raise UserError(f"shard {path}: no such file; the data set is not complete, copy it again") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"shard {path}: not a Parquet file ({error}); copy it again") from None


def _read_columns(path: Path, columns: list[str]) -> pa.Table:
    try:
        # Small columns: threads would cost more. By row groups: Arrow cannot read nested dictionaries across them.
        with pq.ParquetFile(path, memory_map=True, page_checksum_verification=True) as file:
            groups = [file.read_row_group(i, columns, use_threads=False) for i in range(file.num_row_groups)]
            return pa.concat_tables(groups or [file.read(columns, use_threads=False)])
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"shard {path}: columns {', '.join(columns)} are damaged ({error})") from None


def _check_schema(path: Path, metadata: pq.FileMetaData) -> int:
    """Check version and columns; return S."""
    entries = metadata.metadata or {}
    if METADATA_VERSION not in entries:
        raise UserError(f"shard {path}: has no format version; it was not written by preprocess")
    version = entries[METADATA_VERSION].decode()
    if version != str(FORMAT_VERSION):
        raise UserError(
            f"shard {path}: format version {version}, this reader knows {FORMAT_VERSION}; update parquetry"
        )
    if METADATA_FINGERPRINT not in entries:
        raise UserError(f"shard {path}: has no fingerprint; it was not written by preprocess")
    schema = metadata.schema.to_arrow_schema()
    position = schema.get_field_index("tokens")
    kind = schema.field(position).type if position >= 0 else pa.null()
    width = kind.byte_width if pa.types.is_fixed_size_binary(kind) else 4
    expected = shard_schema(width // 4)
    if schema.names != expected.names:
        raise UserError(f"shard {path}: columns are {schema.names}, expected {expected.names}")
    for field in expected:
        found = schema.field(field.name)
        if found.type != field.type or found.nullable:
            raise UserError(
                f"shard {path}: column {field.name!r} is {found.type}, expected {field.type} not null"
            )
    return width // 4
