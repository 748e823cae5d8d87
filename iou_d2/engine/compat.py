"""What differs between Detectron2 0.5 and Detectron2 main: the only such file."""

from __future__ import annotations

import platform

import detectron2
import torch
import torch.distributed as dist
import torchvision
from detectron2.utils import comm

from iou_d2 import __version__


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "detectron2": detectron2.__version__,
        "iou_d2": __version__,
    }


def create_local_process_group(processes: int) -> None:
    """Tell Detectron2 which processes share a machine: `processes` on each, of consecutive ranks.

    All processes call it together, after `torch.distributed.init_process_group`.
    """
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(processes)
        return
    for first in range(0, comm.get_world_size(), processes):
        ranks = range(first, first + processes)
        group = dist.new_group(list(ranks))
        if comm.get_rank() in ranks:
            comm._LOCAL_PROCESS_GROUP = group


def forget_process_groups() -> None:
    """Drop the references to process groups that Detectron2 keeps."""
    comm._get_global_gloo_group.cache_clear()
    comm._LOCAL_PROCESS_GROUP = None
