"""Damage to files, and a child process that meets it: what is tested here is C and C++ in part."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import strategies as st


@st.composite
def mutated(draw: st.DrawFn, content: bytes) -> bytes:
    """A few bytes changed, taken out or put in, more often near the end, where footers are; or the end cut off."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 5))):
        last = max(0, len(data) - 1)
        position = draw(
            st.integers(0, last) | st.integers(0, min(600, last)).map(lambda back, last=last: last - back)
        )
        kind = draw(st.sampled_from(("set", "set", "set", "flip", "flip", "take", "put", "cut")))
        if kind == "set":
            byte = st.sampled_from((b"\0", b"\xff", b"\x7f", b"\x80")) | st.binary(min_size=1, max_size=1)
            data[position : position + 1] = draw(byte)
        elif kind == "flip" and data:
            data[position] ^= 1 << draw(st.integers(0, 7))
        elif kind == "take":
            del data[position : position + draw(st.integers(1, 40))]
        elif kind == "put":
            data[position:position] = draw(st.binary(min_size=1, max_size=20))
        elif kind == "cut":
            del data[position:]
    return bytes(data)


def run_child(
    target: Callable[[str, Sequence[str], int], None], directory: Path, names: Sequence[str], examples: int
) -> None:
    """`target` in a process of its own, which must end by itself, and well; it leaves its input in `directory`."""
    child = multiprocessing.get_context("spawn").Process(
        target=target, args=(str(directory), list(names), examples)
    )
    child.start()
    child.join(600)
    if child.is_alive():
        child.kill()
        pytest.fail(f"a read of {names} hangs; the input is in {directory}")
    assert child.exitcode == 0, f"exit code {child.exitcode} (below 0: a signal); the input is in {directory}"
