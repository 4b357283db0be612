"""Memory that large pictures leave behind in the allocator."""

from __future__ import annotations

import ctypes

# Pillow takes pictures in blocks of 16 MB, which glibc keeps when they are freed: half a gigabyte after a few
# pictures of 64 megapixels. Below this size it is little, and taking it anew would cost more than it is worth.
LARGE_PIXELS = 16 << 20

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others keep less


def give_back() -> None:
    """Let the system have the freed memory of this process."""
    if _trim is not None:
        _trim(0)
