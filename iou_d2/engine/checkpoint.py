"""Checkpoints that are written whole, and that are loaded from what was read before."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from .pretrained import is_pretrained, load_pretrained


class AtomicCheckpointer(DetectionCheckpointer):
    """A DetectionCheckpointer of which a crash never leaves half a file behind.

    Each file is written beside its place and renamed when it is on the disk. `extra` is stored in
    every checkpoint as it is. It also loads ImageNet weights of torchvision by name.
    """

    def __init__(self, model, save_dir: str = "", *, extra: dict | None = None, **checkpointables):
        super().__init__(model, save_dir, **checkpointables)
        self.extra = extra or {}

    def load(self, path: str, *args, **kwargs) -> dict:
        if path and is_pretrained(path):
            load_pretrained(self.model, path)
            return {}
        return super().load(path, *args, **kwargs)

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


class ReadCheckpointer(DetectionCheckpointer):
    """A DetectionCheckpointer that loads `content`, which was read from its file already.

    `load(path)` says by its ending how Detectron2 is to take it: a .pkl without "__author__" has
    the names of Caffe2, which are matched with those of the model.
    """

    def __init__(self, model: nn.Module, content: dict):
        super().__init__(model)
        self.content = content

    def _load_file(self, filename: str) -> dict:
        if not filename.endswith(".pkl"):
            return self.content if "model" in self.content else {"model": self.content}
        if "model" in self.content and "__author__" in self.content:
            return self.content
        blobs = self.content.get("blobs", self.content)
        weights = {name: blob for name, blob in blobs.items() if not name.endswith("_momentum")}
        return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _replace_file(path: str, write: Callable) -> None:
    unfinished = f"{path}.unfinished"
    with open(unfinished, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
