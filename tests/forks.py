"""Processes that begin with torch, Detectron2 and iou_d2 loaded, which takes seconds: forks of one
process that has loaded them and done nothing else."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable

# Read when torch is loaded: forks of a busy machine have one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["iou_d2.commands.train", "iou_d2.commands.detect"])


def run_forks(function: Callable, count: int, *arguments) -> None:
    """Run `function(rank, *arguments)` in `count` forks at once, which all have to end well.

    `function` must be importable by name.
    """
    forks = [FORKS.Process(target=function, args=(rank, *arguments)) for rank in range(count)]
    for fork in forks:
        fork.start()
    for fork in forks:
        fork.join(timeout=250)  # a busy machine starts processes slowly
        fork.kill()  # has no effect where it has ended
        fork.join()
    assert [fork.exitcode for fork in forks] == [0] * count
