"""Parquet page headers: those that pyarrow writes, and bytes that are none."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.page_header import DATA_PAGE, PLAIN, PageHeader, read_page_header

PLAIN_V1 = {
    "compression": "NONE",
    "use_dictionary": False,
    "data_page_version": "1.0",
    "write_page_checksum": True,
}
# PageHeader of parquet.thrift in the compact protocol: field 1 type = 0, field 3 compressed size = 7 (zigzag
# 14), field 5 {field 1 num_values = 3 (zigzag 6), field 2 encoding = 0}; a field's byte is delta << 4 | type.
BY_HAND = bytes([0x15, 0, 0x25, 14, 0x2C, 0x15, 6, 0x15, 0, 0, 0])


def write(path: Path, column: pa.Array, **options: Any) -> tuple[memoryview, pq.FileMetaData]:
    table = pa.Table.from_arrays([column], schema=pa.schema([pa.field("x", column.type, nullable=False)]))
    pq.write_table(table, path, **{**PLAIN_V1, **options})
    return memoryview(path.read_bytes()), pq.read_metadata(path)


@pytest.mark.parametrize("write_statistics", [False, True])
@pytest.mark.parametrize(
    "column",
    [
        pa.array(range(1000), pa.int64()),
        pa.array([b"12345678"] * 77, pa.binary(8)),
        pa.array([b"", b"a", b"b" * 70_000], pa.large_binary()),
    ],
    ids=["int64", "fixed", "binary"],
)
def test_header_of_a_plain_page_tells_its_size_its_values_and_its_checksum(
    tmp_path: Path, column: pa.Array, write_statistics: bool
) -> None:
    data, metadata = write(tmp_path / "x.parquet", column, write_statistics=write_statistics)
    chunk = metadata.row_group(0).column(0)
    header = read_page_header(data, chunk.data_page_offset)
    assert (header.kind, header.encoding, header.num_values) == (DATA_PAGE, PLAIN, len(column))
    assert header.header_bytes + header.payload_bytes == chunk.total_compressed_size
    start = chunk.data_page_offset + header.header_bytes
    # The Parquet format names the CRC of GZIP over the page's bytes as they are stored.
    assert header.crc == zlib.crc32(data[start : start + header.payload_bytes])


def test_pages_of_one_chunk_follow_each_other(tmp_path: Path) -> None:
    column = pa.array(range(1000), pa.int64())
    data, metadata = write(tmp_path / "x.parquet", column, data_page_size=800, write_batch_size=100)
    chunk = metadata.row_group(0).column(0)
    offset, end, values = chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size, []
    while offset < end:
        header = read_page_header(data, offset)
        values.append(header.num_values)
        offset += header.header_bytes + header.payload_bytes
    assert offset == end
    assert values == [100] * 10  # 100 values of 8 bytes fill a page


def test_other_pages_are_told_apart(tmp_path: Path) -> None:
    column = pa.array(range(1000), pa.int64())
    data, metadata = write(tmp_path / "2.parquet", column, data_page_version="2.0")
    assert read_page_header(data, metadata.row_group(0).column(0).data_page_offset).kind == 3
    data, metadata = write(tmp_path / "d.parquet", column, use_dictionary=True)
    chunk = metadata.row_group(0).column(0)
    assert read_page_header(data, chunk.dictionary_page_offset).kind == 2
    assert read_page_header(data, chunk.data_page_offset).encoding == 8  # RLE_DICTIONARY
    data, metadata = write(tmp_path / "n.parquet", column, write_page_checksum=False)
    assert read_page_header(data, metadata.row_group(0).column(0).data_page_offset).crc is None


def test_header_by_hand() -> None:
    expected = PageHeader(kind=0, header_bytes=11, payload_bytes=7, crc=None, num_values=3, encoding=0)
    assert read_page_header(memoryview(b"??" + BY_HAND + b"payload"), 2) == expected


def test_fields_that_are_not_needed_are_passed_over() -> None:
    # After field 5 of BY_HAND, before its last byte: fields 6 to 11 of every other type.
    extra = bytes([0x13, 0x89])  # byte
    extra += bytes([0x17]) + bytes(8)  # double
    extra += bytes([0x18, 3]) + b"abc"  # binary
    extra += bytes([0x11])  # boolean, its value is in the type
    extra += bytes([0x19, 0x31, 1, 2, 1])  # list of three booleans, one byte each
    extra += bytes([0x1A, 0x25, 2, 0x80, 1])  # set of two i32
    header = read_page_header(memoryview(BY_HAND[:-1] + extra + b"\0"), 0)
    assert (header.header_bytes, header.payload_bytes, header.num_values) == (11 + len(extra), 7, 3)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",  # an empty struct
        BY_HAND[:-1],  # no end
        b"\x15\x00\x00",  # no size
        b"\x18\x00" + BY_HAND,  # the type is a string
        b"\x18\xff\xff\xff\xff\x0f",  # a string that is longer than the file
        b"\x1c" * 100_000,  # structs in structs
        b"\x15" + b"\x80" * 300_000,  # an integer without an end
        b"\x15" + b"\x80" * 10 + BY_HAND[1:],  # an integer of 11 bytes
        b"\x19\xf9" + b"\xff" * 9 + b"\x01",  # a list of 2**63 lists
        b"\x1d",  # no type of the compact protocol
        # A list of lists of booleans, each of which claims to hold 2**28.
        b"\x19\xf9\xff\xff\xff\x7f" + b"\xf1\xff\xff\xff\x7f" * 20_000,
    ],
    ids=lambda data: f"{len(data)} bytes",
)
def test_what_is_no_header_is_a_value_error_at_once(data: bytes) -> None:
    with pytest.raises(ValueError, match="no page header at byte 0"):
        read_page_header(memoryview(data), 0)


def test_an_offset_past_the_end_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="no page header at byte 99"):
        read_page_header(memoryview(BY_HAND), 99)


def check_any(data: bytes) -> None:
    """Bytes are a header inside the data, or a ValueError; nothing else, and soon."""
    try:
        header = read_page_header(memoryview(data), 0)
    except ValueError:
        return
    assert 0 < header.header_bytes <= len(data)


@given(st.binary(max_size=400))
def test_random_bytes_are_a_header_or_a_value_error(data: bytes) -> None:
    check_any(data)


@given(st.lists(st.sampled_from([0x00, 0x11, 0x15, 0x18, 0x19, 0x1C, 0x29, 0xF1, 0xF9, 0xFF, 0x80])))
def test_random_types_and_lengths_are_a_header_or_a_value_error(data: list[int]) -> None:
    check_any(bytes(data))


@given(st.integers(0, len(BY_HAND) - 1), st.integers(0, 255))
def test_a_changed_byte_is_a_header_or_a_value_error(place: int, value: int) -> None:
    changed = bytearray(BY_HAND)
    changed[place] = value
    check_any(bytes(changed))
