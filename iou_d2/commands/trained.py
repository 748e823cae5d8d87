"""Trained models as commands load them: whole, and for the classes that are asked for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from iou_d2.engine.checkpoint import SafeCheckpointer, split_weights
from iou_d2.engine.config_checks import check_config, require_detections
from iou_d2.engine.precision import with_precision
from iou_d2.engine.pretrained import require_trained
from iou_d2.engine.safe_load import local_file, read_checkpoint_file
from iou_d2.errors import InputError


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-weights",
        action="store_true",
        help="let the file of the weights make any object, and so run any code",
    )


def read_weights(cfg: CfgNode, trust: bool = False) -> dict:
    """What MODEL.WEIGHTS hold. Raises InputError where nothing is named, or what was named is not
    there or no checkpoint."""
    if not cfg.MODEL.WEIGHTS:
        raise InputError("Nothing is trained: give MODEL.WEIGHTS at the end of the command line.")
    require_trained(cfg.MODEL.WEIGHTS)
    path, _ = split_weights(cfg.MODEL.WEIGHTS)
    return read_checkpoint_file(local_file(path), trust)


def fill(model: nn.Module, cfg: CfgNode, content: dict) -> nn.Module:
    """`model` with the weights in `content`, which `read_weights` read for `cfg`.

    Raises InputError where they would leave a part of the model untrained.
    """
    checkpointer = SafeCheckpointer(model, content=content)
    checkpointer.load(cfg.MODEL.WEIGHTS)
    mismatch = checkpointer.mismatch
    learnt = {name for name, _ in model.named_parameters()}
    if mismatch.other_shapes or not mismatch.loaded or learnt.intersection(mismatch.missing):
        raise InputError(f"The weights do not fit the config: {mismatch.sentence()}")
    return model


def load_trained(cfg: CfgNode, trust: bool = False) -> nn.Module:
    """The model of `cfg` with MODEL.WEIGHTS, in test mode.

    Raises InputError: the config is wrong, or the weights are not there, do not fit or do not fill
    the model.
    """
    check_config(cfg)
    require_detections(cfg)
    content = read_weights(cfg, trust)
    names = names_in(content, cfg.MODEL.WEIGHTS)
    if names and cfg.MODEL.CLASS_NAMES:
        require_same_names(names, list(cfg.MODEL.CLASS_NAMES), cfg.MODEL.WEIGHTS, "the config")
        if names != list(cfg.MODEL.CLASS_NAMES):
            raise InputError(
                f"{cfg.MODEL.WEIGHTS} has the classes in the order {', '.join(names)}, but the "
                f"config in the order {', '.join(cfg.MODEL.CLASS_NAMES)}."
            )
    return fill(with_precision(build_model(cfg).eval(), cfg), cfg, content)


def names_in(content: dict, weights: str) -> list[str]:
    """The names of the classes that a checkpoint knows, in the order of its outputs; may be []."""
    names = content.get("class_names")
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        if names is None:
            return []
        raise InputError(f"{weights} has class_names that are no list of names: {names!r:.80}.")
    if len(set(names)) < len(names):
        raise InputError(f"{weights} has one of the class_names {', '.join(names)} twice.")
    return list(names)


def require_same_names(
    known: Sequence[str], wanted: Sequence[str], weights: str, where: str
) -> None:
    """Raise an InputError with both lists unless they are the same names, in any order."""
    if sorted(known) != sorted(wanted):
        raise InputError(
            f"{weights} knows the classes {', '.join(known)}, but {where} has "
            f"{', '.join(wanted) or 'none'}."
        )
