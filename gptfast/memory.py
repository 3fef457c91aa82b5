"""Memory that is freed and needed again at once: keeping it costs nothing and saves page faults.

glibc maps every large tensor anew and gives it back when it is freed, so that each training step
touches all of its memory for the first time. On a CPU those page faults can cost more than the
arithmetic.
"""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD = -1  # numbers from malloc.h
M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Tell the allocator of this process to keep freed memory for the next tensor.

    Memory use stays at its peak afterwards. `gptfast train` calls this; importing gptfast does not.

    Returns:
        Whether the allocator took the advice: True with glibc, False elsewhere (nothing is
        changed).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
