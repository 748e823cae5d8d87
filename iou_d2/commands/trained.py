"""Trained models as commands load them: whole, and for the classes that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from detectron2.config import CfgNode
from torch import nn

from iou_d2 import get_config
from iou_d2.config import set_class_names
from iou_d2.engine.build import build_detector
from iou_d2.engine.checkpoint import (
    SafeCheckpointer,
    split_weights,
    untrained_predictor,
    use_tta,
)
from iou_d2.engine.config_checks import check_config, require_detections
from iou_d2.engine.pretrained import require_trained
from iou_d2.engine.safe_load import local_file, read_checkpoint_file
from iou_d2.errors import InputError
from iou_d2.field_names import OPTIONAL_FIELDS


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
    return fill(build_detector(cfg).eval(), cfg, content)


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


def setup(
    config_file: str, overrides: list[str], trust: bool = False, augments: bool = False
) -> tuple[CfgNode, dict]:
    """The config with the names of the classes, and what its MODEL.WEIGHTS hold. `augments`: see
    `check_config`."""
    cfg = get_config(config_file, overrides)
    check_config(cfg, augments)
    require_detections(cfg)
    checkpoint = read_weights(cfg, trust)
    names = names_in(checkpoint, cfg.MODEL.WEIGHTS) or cfg.MODEL.CLASS_NAMES
    if names:
        set_class_names(cfg, names)
    cfg.freeze()
    return cfg, checkpoint


def open_trained(
    config_file: str, overrides: list[str], trust: bool = False
) -> tuple[Callable[[np.ndarray], dict[str, np.ndarray]], Sequence[str]]:
    """A trained detector that answers as those of iou_d2/runtime do, and the names of its classes,
    which may be none. Test-time augmentation is as the config says."""
    cfg, checkpoint = setup(config_file, overrides, trust, augments=True)
    return TrainedDetector(cfg, checkpoint), cfg.MODEL.CLASS_NAMES


class TrainedDetector:
    """Detectron2's DefaultPredictor that answers as a Detector of iou_d2/runtime does.

    Attributes:
        predictor: the DefaultPredictor.
    """

    def __init__(self, cfg: CfgNode, checkpoint: dict):
        """`checkpoint` is what `setup` read of MODEL.WEIGHTS. Raises as `fill` does."""
        self.predictor = untrained_predictor(cfg)
        fill(self.predictor.model, cfg, checkpoint)
        use_tta(self.predictor, cfg)

    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """(H, W, 3) uint8 BGR -> its D detections, best first: "boxes" (D, 4) XYXY in pixels of
        `image`, "scores" (D,), "classes" (D,) and what it has of OPTIONAL_FIELDS, (D,)."""
        instances = self.predictor(image)["instances"].to("cpu")
        return {
            "boxes": instances.pred_boxes.tensor.numpy(),
            "scores": instances.scores.numpy(),
            "classes": instances.pred_classes.numpy(),
            **{x: instances.get(x).numpy() for x in OPTIONAL_FIELDS if instances.has(x)},
        }
