"""What differs between Detectron2 0.5, Detectron2 main and PyTorch versions: the only such file."""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultTrainer
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm


class AtomicCheckpointer(DetectionCheckpointer):
    """A DetectionCheckpointer of which a crash never leaves half a file behind.

    Each file is written beside its place and renamed when it is on the disk. `extra` is stored in
    every checkpoint as it is.
    """

    def __init__(self, model, save_dir: str = "", *, extra: dict | None = None, **checkpointables):
        super().__init__(model, save_dir, **checkpointables)
        self.extra = extra or {}

    def save(self, name: str, **kwargs) -> None:
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict(), **self.extra}
        for key, part in self.checkpointables.items():
            data[key] = part.state_dict()
        data.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        _replace_file(path, lambda file: torch.save(data, file))
        self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        path = os.path.join(self.save_dir, "last_checkpoint")
        _replace_file(path, lambda file: file.write(last_filename_basename.encode()))


def _replace_file(path: str, write: Callable) -> None:
    unfinished = f"{path}.unfinished"
    with open(unfinished, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


class ResumableTrainer(DefaultTrainer):
    """A DefaultTrainer whose checkpoints hold all that --resume needs.

    Detectron2 0.5 forgets the optimizer; main keeps it under "_trainer". Here both keep it so. The
    two group the parameters differently, so a run resumes on the version that began it.
    """

    def build_hooks(self):
        # The hook that saves takes its checkpointer from here.
        self.checkpointer = AtomicCheckpointer(
            self.model,
            self.cfg.OUTPUT_DIR,
            extra={"class_names": list(self.cfg.MODEL.CLASS_NAMES)},
            trainer=weakref.proxy(self),
        )
        return super().build_hooks()

    def state_dict(self) -> dict:
        state = TrainerBase.state_dict(self)
        state["_trainer"] = {"iteration": self.iter, "optimizer": self.optimizer.state_dict()}
        if hasattr(self._trainer, "grad_scaler"):
            state["_trainer"]["grad_scaler"] = self._trainer.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state: dict) -> None:
        TrainerBase.load_state_dict(self, state)
        if "_trainer" not in state:
            raise KeyError(
                "The checkpoint holds no optimizer state: it was written by Detectron2 0.5's own "
                "trainer. Start from its weights with MODEL.WEIGHTS and without --resume."
            )
        try:
            self.optimizer.load_state_dict(state["_trainer"]["optimizer"])
        except ValueError as error:
            raise ValueError(
                "The optimizer of the checkpoint has other parameters than this one. Resume with "
                "the config and the Detectron2 version (0.5 or main) that began the run."
            ) from error
        if hasattr(self._trainer, "grad_scaler") and "grad_scaler" in state["_trainer"]:
            self._trainer.grad_scaler.load_state_dict(state["_trainer"]["grad_scaler"])


def spawn_cpu(function: Callable, processes: int, *arguments) -> None:
    """Run `function(rank, *arguments)` in `processes` CPU processes that form one gloo group.

    Detectron2's `launch` refuses CPUs in 0.5. `function` must be importable by name.
    """
    rendezvous = f"tcp://127.0.0.1:{_free_port()}"
    mp.spawn(_join_group, (processes, rendezvous, function, arguments), nprocs=processes)


def _join_group(rank: int, processes: int, rendezvous: str, function: Callable, arguments) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rendezvous, rank=rank, world_size=processes)
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(processes)
    else:
        comm._LOCAL_PROCESS_GROUP = dist.new_group(list(range(processes)))
    function(rank, *arguments)
    dist.barrier()  # a process that leaves early takes the connections of the others with it
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
