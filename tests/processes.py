"""Several CPU processes for a test."""

from __future__ import annotations

from collections.abc import Callable

import torch
from detectron2.utils import comm

from iou_d2.engine.launch import launch


def spawn_cpu(function: Callable, processes: int, *arguments) -> None:
    """Run `function(rank, *arguments)` in `processes` CPU processes that form one gloo group.

    `function` must be importable by name.
    """
    launch(_with_rank, (function, arguments), num_gpus=0, num_processes=processes)


def _with_rank(function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    function(comm.get_rank(), *arguments)
