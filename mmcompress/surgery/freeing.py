"""Give memory back to the system while weights are replaced one after the other."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def give_back_freed() -> None:
    """Return freed heap memory to the system, where the C library can be told to (glibc); elsewhere do nothing.

    glibc keeps what is freed between blocks that are still in use. Replacing every weight of a model by a smaller one so left
    both resident: 1.6 times the model at the peak, 1.1 times with this after every block (CLIP ViT-L, measured).
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # not glibc, not Linux, Windows
        return None
    found.argtypes, found.restype = [ctypes.c_size_t], ctypes.c_int
    return found
