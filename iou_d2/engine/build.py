"""Detectors that compute as their config says: the way to a model of all that trains or detects.

Detectron2's own `build_model` and `DefaultPredictor` know nothing of it: their models compute in
float32, uncompiled, which what is exported or converted has to.
"""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from iou_d2.layers.roi_align import use_compiled_roi_align

from .compilation import compile_networks, require_compiler
from .folding import fold_norms
from .precision import networks_of, with_precision


def build_detector(cfg: CfgNode) -> nn.Module:
    """The model of `cfg` with random weights. Raises what `as_configured` does."""
    return as_configured(build_model(cfg), cfg)


def as_configured(model: nn.Module, cfg: CfgNode) -> nn.Module:
    """`model`, whose networks compute from now on as MODEL.PRECISION, MODEL.MEMORY_FORMAT and
    MODEL.COMPILE say. Names, shapes and precision of its tensors stay as they are.

    Raises:
        InputError: another value of one of the keys, networks that are not known, or no compiler.
    """
    with_precision(model, cfg)
    device = next(model.parameters()).device.type
    if cfg.MODEL.COMPILE:
        require_compiler(device)
        compile_networks(networks_of(model))
    elif device == "cpu":
        fold_norms(model)
        use_compiled_roi_align(model)
    return model
