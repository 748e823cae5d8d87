"""Several CPU processes for a test."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

import iou_d2.detectors  # noqa: F401  (for what it registers)
from forks import run_forks
from iou_d2.engine.launch import free_port, launch


def spawn_cpu(function: Callable, processes: int, *arguments) -> None:
    """Run `function(rank, *arguments)` in `processes` CPU processes that form one gloo group.

    `function` must be importable by name.
    """
    run_forks(_join, processes, processes, free_port(), function, arguments)


def _join(rank: int, processes: int, port: int, function: Callable, arguments: tuple) -> None:
    """What the fork does: it forms the group as a process of torchrun does."""
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank}
    sizes = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ.update({name: str(value) for name, value in (places | sizes).items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    launch(function, (rank, *arguments), num_gpus=0)


def two_steps(cfgs: list[CfgNode], batches: list[list[dict]], folder: Path, lr: float) -> list:
    """Two steps of SGD of each model in as many processes as there are batches, each of which sees
    its own.

    Returns:
        For each config and each process the losses of both steps, and the model's state after them.
    """
    spawn_cpu(_two_steps_of_a_process, len(batches), cfgs, batches, folder, lr)
    return [
        [torch.load(folder / f"{index}_{rank}.pth") for rank in range(len(batches))]
        for index in range(len(cfgs))
    ]


def _two_steps_of_a_process(rank: int, cfgs, batches, folder: Path, lr: float) -> None:
    for index, cfg in enumerate(cfgs):
        torch.manual_seed(0)
        model = build_model(cfg).train()
        model = DistributedDataParallel(model, broadcast_buffers=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        steps = []
        with EventStorage():
            for _ in range(2):
                losses = model(batches[rank])
                optimizer.zero_grad()
                sum(losses.values()).backward()
                optimizer.step()
                steps.append({name: loss.item() for name, loss in losses.items()})
        torch.save([steps, model.module.state_dict()], folder / f"{index}_{rank}.pth")
