"""Parquet tables that this program wrote itself, read back, from this machine or a store."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from shared.errors import UserError
from shared.files import open_file
from shared.remote import is_remote, shown


def read_table(path: Path, mend: str, **options: Any) -> pa.Table:
    """`pyarrow.parquet.read_table`, page checksums verified.

    Raises:
        UserError: the file is missing or damaged; `mend` is what the message tells the reader to do.
    """
    with _source(path, mend) as source:
        return pq.read_table(source, page_checksum_verification=True, **options)


@contextmanager
def open_table(path: Path, mend: str) -> Generator[pq.ParquetFile, None, None]:
    """A table to read in parts, page checksums verified.

    Raises:
        UserError: the file is missing, or damaged where the block reads it; `mend` as in `read_table`.
    """
    with _source(path, mend) as source, pq.ParquetFile(source, page_checksum_verification=True) as file:
        yield file


@contextmanager
def _source(path: Path, mend: str) -> Generator[Path | BinaryIO, None, None]:
    """What pyarrow opens, and its errors as one line."""
    try:
        if not is_remote(path):
            yield path  # read without Python
            return
        with open_file(path) as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{shown(path)}: no such file; {mend}") from None
    except (pa.ArrowException, OSError) as error:
        if is_remote(path) and isinstance(error, OSError) and error.errno is not None:
            raise  # of the store, and it may pass
        raise UserError(f"{shown(path)}: damaged ({error}); {mend}") from None
