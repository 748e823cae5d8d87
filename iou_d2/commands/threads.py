"""How many threads compute, and how they wait. Needs no torch: the latter has to be said before
torch is loaded."""

from __future__ import annotations

import os


def limit_spinning() -> None:
    """Set GOMP_SPINCOUNT, unless the user did.

    GCC's OpenMP threads, which torch uses on the CPU, spin for milliseconds while they wait for
    each other. Where there are fewer free cores than threads (a busy machine, a container with a
    limit) they keep each other from working. OpenMP reads the variable once, when it is loaded.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def count_threads() -> int:
    """OMP_NUM_THREADS, which torch obeys too, or the cores that this process may use."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    if said.isdecimal() and int(said) > 0:
        return int(said)
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
