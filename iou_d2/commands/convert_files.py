"""The files of `iou-d2 convert`: what it reads and what it writes."""

from __future__ import annotations

import argparse
import os
import pickle
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from iou_d2.engine.convert import backbone_prefix
from iou_d2.engine.safe_load import read_checkpoint_file
from iou_d2.engine.whole_file import replace_file
from iou_d2.errors import InputError

COUNTER = "num_batches_tracked"  # of BatchNorm; Detectron2's FrozenBatchNorm2d has none


class Checkpoint(NamedTuple):
    """Tensors by name, what else its state dict holds, the names of the classes that it knows, and
    the text of its mmdetection config."""

    tensors: dict[str, Tensor]
    other: list[str]
    class_names: list[str]
    config_text: str


def entry(node: dict, *keys: str) -> dict:
    """The first of the dicts that `node` has under `keys`, or an empty one."""
    return next((node[key] for key in keys if isinstance(node.get(key), dict)), {})


def read_checkpoint(path: str, trust: bool = False) -> Checkpoint:
    """The state dict in `path`, which may lie in the "state_dict" of mmdetection or the "model" of
    Detectron2."""
    content = read_checkpoint_file(path, trust)
    state = entry(content, "state_dict", "model")
    state = {**state, **entry(content, COUNTER)} if state else content
    tensors, other = {}, []
    for name, value in state.items():
        if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "fiub":
            value = torch.from_numpy(np.array(value))
        if isinstance(value, Tensor):
            tensors[str(name).removeprefix("module.")] = value.detach()
        else:
            other.append(str(name))

    meta = entry(content, "meta")
    known = {**content, **entry(meta, "dataset_meta"), **meta}
    names = known.get("CLASSES") or known.get("classes") or known.get("class_names")
    names = [str(name) for name in names] if isinstance(names, (list, tuple)) else []
    return Checkpoint(tensors, other, names, str(meta.get("cfg") or meta.get("config") or ""))


def pack(tensors: dict[str, Tensor], class_names: list[str], target: str, path: str) -> dict:
    """What is written to `path`, in the layout `target`."""
    if target in ("torchvision", "amdegroot", "luuuyi"):
        return OrderedDict(tensors)
    if target == "lufficc":
        return {"model": OrderedDict(tensors)}
    if target == "mmdet":
        meta = {"CLASSES": tuple(class_names)} if class_names else {}
        return {"meta": meta, "state_dict": OrderedDict(tensors)}
    # The counters are kept for the way back only.
    counters = {name: x for name, x in tensors.items() if name.endswith(COUNTER)}
    model = {name: x for name, x in tensors.items() if name not in counters}
    if path.endswith(".pkl"):
        model, counters = to_numpy(model), to_numpy(counters)
    return {
        "model": model,
        COUNTER: counters,
        "class_names": class_names,
        "matching_heuristics": not backbone_prefix(tensors),
        "__author__": "iou_d2",
    }


def to_numpy(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    try:
        return {name: x.numpy() for name, x in tensors.items()}
    except TypeError as error:
        raise InputError("NumPy has no bfloat16, so OUT can only be a .pth.") from error


def write_file(content: dict, path: str) -> None:
    """Write `path` whole or not at all."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    if path.endswith(".pkl"):
        replace_file(path, lambda file: pickle.dump(content, file, protocol=4))
    else:
        replace_file(path, lambda file: torch.save(content, file))


def check_paths(args: argparse.Namespace) -> None:
    if os.path.isdir(args.output):
        raise InputError(f"OUT is the folder {args.output}; give the name of a file.")
    if args.output.endswith(".pkl") and args.target != "detectron2":
        raise InputError(f"OUT is {args.output}, but only Detectron2 reads .pkl files.")
    if not os.path.exists(args.output):
        return
    if os.path.exists(args.input) and os.path.samefile(args.input, args.output):
        raise InputError(f"IN and OUT are the same file, {args.input}.")
    if not args.force:
        raise InputError(f"{args.output} is there already; --force overwrites it.")
