"""The pages of a mapped file, brought into the process at once instead of by a fault every few pages.

Each pack of an epoch lies in pages that the process has not touched before. With the file in the page cache, the
faults of a pack cost a third of its copy (benchmarks/loader.py: `one_by_one`); one call maps all of it.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy.typing as npt

# Linux 5.14; Python has no name for it.
MADV_POPULATE_READ = 22

# By ctypes, which lets other threads run meanwhile; mmap.madvise holds the interpreter lock.
_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def populate(array: npt.NDArray[Any]) -> None:
    """Map the pages of a contiguous array. A hint: where the system does not know it, pages come one by one."""
    if array.nbytes:
        address = array.ctypes.data
        first = address // mmap.PAGESIZE * mmap.PAGESIZE
        _madvise(first, address + array.nbytes - first, MADV_POPULATE_READ)
