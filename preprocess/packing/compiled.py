"""numba's decorator, with the types that numba leaves out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., Any])

# `_nrt`: no arrays are made inside, so none are counted. A tuple of arrays is counted array by array whenever it is
# handed on, one atomic operation each, and that took more than half of the packer's time.
OPTIONS: dict[str, Any] = {"nogil": True, "_nrt": False}


def compiled(function: Function) -> Function:
    """Machine code, made at the first call and kept beside the source; no thread of its own, no lock held.

    Where neither the source's directory nor the user's cache can be written, every process compiles anew,
    and says so.
    `pack_pieces` gives every argument one fixed type, so each function is compiled once.
    """
    try:
        return cast(Function, numba.njit(cache=True, **OPTIONS)(function))
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        warnings.warn(
            f"the packer is compiled anew in every process, nothing beside {__file__} can be written; "
            "set NUMBA_CACHE_DIR to a directory that can",
            stacklevel=1,
        )
        return cast(Function, numba.njit(**OPTIONS)(function))
