"""How the threads of torch wait. Needs no torch, for it has to be called before torch is loaded."""

from __future__ import annotations

import os


def limit_spinning() -> None:
    """Set GOMP_SPINCOUNT, unless the user did.

    GCC's OpenMP threads, which torch uses on the CPU, spin for milliseconds while they wait for
    each other. Where there are fewer free cores than threads (a busy machine, a container with a
    limit) they keep each other from working. OpenMP reads the variable once, when it is loaded.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
