"""numba's decorator, with the types that numba leaves out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Machine code, made at the first call and kept beside the source; no thread of its own, no lock held.

    `pack_pieces` gives every argument one fixed type, so each function is compiled once.
    """
    return cast(Function, numba.njit(cache=True, nogil=True)(function))
