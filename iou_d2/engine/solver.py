"""The optimizer: Detectron2's SGD, or AdamW for small models that train from scratch."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import (
    build_optimizer,
    get_default_optimizer_params,
    maybe_add_gradient_clipping,
)
from torch import nn

from iou_d2.errors import InputError


def build_solver(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of `model` that SOLVER.OPTIMIZER names; all other SOLVER keys as in Detectron2.

    Raises InputError for another name than "SGD" or "AdamW".
    """
    if cfg.SOLVER.OPTIMIZER == "SGD":
        return build_optimizer(cfg, model)
    if cfg.SOLVER.OPTIMIZER != "AdamW":
        raise InputError(
            f"SOLVER.OPTIMIZER is 'SGD' or 'AdamW', but it is {cfg.SOLVER.OPTIMIZER!r}."
        )
    parameters = get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
    )
    optimizer = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
    return optimizer(parameters, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)
