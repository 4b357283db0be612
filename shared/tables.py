"""Parquet tables that this program wrote itself, read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shared.errors import UserError


def read_table(path: Path, mend: str, **options: Any) -> pa.Table:
    """`pyarrow.parquet.read_table`, page checksums verified.

    Raises:
        UserError: the file is missing or damaged; `mend` is what the message tells the reader to do.
    """
    try:
        return pq.read_table(path, page_checksum_verification=True, **options)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {mend}") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: damaged ({error}); {mend}") from None
