"""The config of a run."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, get_cfg

from . import backbones, detectors  # noqa: F401  (for what they register)
from .config_files import find_config
from .config_keys import add_keys
from .config_merging import merge_file, merge_overrides
from .old_keys import register_old_keys


def add_iou_config(cfg: CfgNode) -> None:
    """Add the keys of iou_d2 to `cfg`, in place: see config_keys.py."""
    add_keys(cfg)
    register_old_keys(cfg)


def get_config(config_file: str | os.PathLike = "", overrides: Sequence[str] = ()) -> CfgNode:
    """Detectron2's defaults, the keys of iou_d2, `config_file` and KEY VALUE `overrides`, each over
    what stands before it; on the CPU where CUDA is asked for and is not there.

    `config_file` is a path, or the name of a config that comes with iou_d2, such as
    "quick/vfnet_own_data". Raises what `load_config` does.
    """
    cfg = get_cfg()
    add_iou_config(cfg)
    load_config(cfg, config_file, overrides)
    use_available_device(cfg)
    return cfg


def load_config(
    cfg: CfgNode, config_file: str | os.PathLike, overrides: Sequence[str] = ()
) -> None:
    """Merge `config_file` (a path, a name as in `get_config`, or empty) and then KEY VALUE
    `overrides` into `cfg`, in place.

    Raises:
        MissingFileError, InputError, UnknownKeyError: sentences that name the file and the key; an
            unknown key comes with the nearest valid one.
    """
    if config_file:
        merge_file(cfg, find_config(config_file))
    merge_overrides(cfg, overrides)


def set_class_names(cfg: CfgNode, names: Sequence[str]) -> None:
    """Store the names of the classes in `cfg`, and their number for every kind of head."""
    cfg.MODEL.CLASS_NAMES = list(names)
    cfg.MODEL.RETINANET.NUM_CLASSES = len(names)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(names)


def use_available_device(cfg: CfgNode) -> None:
    """Set MODEL.DEVICE to the CPU where CUDA is asked for and is not there, and say so."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        print("CUDA is not available, so the model runs on the CPU.", flush=True)
        cfg.MODEL.DEVICE = "cpu"
