"""The heap of the C library, told to keep what a training step frees, because the next step asks for the same again."""

from __future__ import annotations

import ctypes
import functools
import os
import platform

from fewbits.choice import Choice

# From glibc's malloc.h: the parameters of mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_")


@functools.cache
def keep_freed_memory() -> Choice:
    """Lets glibc keep freed memory for the life of this process; Choice(whether it does, reason). Once is enough.

    glibc hands large blocks back to the system when they are freed, so that every activation of every step is mapped and
    zeroed page by page: 26,000 page faults in a step of the nano recipe, 60 to 80 ms of its 370 in bf16. The peak stays
    what it was; what falls between steps is not given back. A user who has set glibc's own variables is left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return Choice(False, "the C library is not glibc")
    tuned = [name for name in _SETTINGS if name in os.environ]
    if tuned or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return Choice(False, f"{tuned[0] if tuned else 'GLIBC_TUNABLES'} is set")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return Choice(False, "this process offers no mallopt")
    kept = mallopt(_MMAP_THRESHOLD, 1 << 30) and mallopt(_TRIM_THRESHOLD, -1) and mallopt(_TOP_PAD, 64 << 20)
    return Choice(bool(kept), "freed blocks are used again" if kept else "mallopt refused")
