"""Mapping a pack's pages at once: what the kernel says is resident before and after."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from trainer.data.pages import populate

PAGES = 512


def resident_kb(address: int) -> int:
    """Of the mapping that holds `address`."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            first, last = (int(word, 16) for word in line.split()[0].split("-"))
            inside = first <= address < last
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1])
    raise AssertionError("no such mapping")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux says what is resident")
def test_the_pages_of_an_array_are_mapped_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(PAGES * mmap.PAGESIZE))
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    whole = np.frombuffer(mapped, np.uint8)
    array = whole[mmap.PAGESIZE - 1 : 100 * mmap.PAGESIZE + 1]  # touches pages 0 to 100
    assert resident_kb(whole.ctypes.data) == 0
    populate(array)
    # Neighbours may come with them: the page cache holds pages in larger units.
    assert resident_kb(whole.ctypes.data) >= 101 * mmap.PAGESIZE // 1024
    populate(array[:0])
    assert array.tobytes() == path.read_bytes()[mmap.PAGESIZE - 1 : 100 * mmap.PAGESIZE + 1]
