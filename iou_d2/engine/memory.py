"""What a process does with memory that it has freed. Needs no torch."""

from __future__ import annotations

import ctypes
import os

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed for the next tensor of this process. False where it is not
    glibc's malloc, or where the user has said what it does.

    As it comes, glibc asks the kernel for every block over 32 MB, a feature map of a large image,
    and gives it back when it is freed. The kernel then clears each page of the next one anew, which
    can take longer than computing it. The process then keeps its peak of memory until it ends, and
    that is higher, for blocks of many sizes leave gaps between each other (benchmarks/malloc.py).
    """
    said = {"MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}
    if said & set(os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return False
    no_maps, no_trimming = libc.mallopt(M_MMAP_MAX, 0), libc.mallopt(M_TRIM_THRESHOLD, -1)
    return bool(no_maps and no_trimming)
