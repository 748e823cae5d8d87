"""The optimizer: Detectron2's SGD, or AdamW for small models that train from scratch."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import (
    build_optimizer,
    get_default_optimizer_params,
    maybe_add_gradient_clipping,
)
from torch import nn

from iou_d2.errors import InputError

from .parameter_names import is_under, parameters_of, require_names


def build_solver(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of `model` that SOLVER.OPTIMIZER names, with the learning rates that
    SOLVER.LR_FACTORS multiplies; all other SOLVER keys as in Detectron2.

    Raises InputError for another name than "SGD" or "AdamW", and for a factor of no parameter. Logs
    a warning where training ends within its warm-up.
    """
    if cfg.SOLVER.MAX_ITER <= cfg.SOLVER.WARMUP_ITERS:
        logging.getLogger(__name__).warning(
            f"Training ends after {cfg.SOLVER.MAX_ITER} iterations, within its warm-up of "
            f"{cfg.SOLVER.WARMUP_ITERS}, so the learning rate never reaches SOLVER.BASE_LR and "
            "next to nothing is learnt: give a smaller SOLVER.WARMUP_ITERS."
        )
    optimizer = _build_optimizer(cfg, model)
    if cfg.SOLVER.LR_FACTORS:
        multiply_learning_rates(optimizer, model, dict(cfg.SOLVER.LR_FACTORS))
    return optimizer


def multiply_learning_rates(
    optimizer: torch.optim.Optimizer, model: nn.Module, factors: Mapping[str, float]
) -> None:
    """Multiply the learning rates of a new optimizer, in place.

    A parameter has the factor of the longest of the names in `factors` that its own begins with,
    in whole dotted parts, and 1 where there is none. Detectron2 0.5 has a group for each parameter
    and main one for all that are alike; a group whose parameters have unlike factors is split.
    """
    require_names(model, list(factors), "SOLVER.LR_FACTORS")
    factor_of = dict.fromkeys(model.parameters(), 1.0)
    # Longer names last, to win.
    for beginning in sorted(factors, key=len):
        for name, parameter in parameters_of(model).items():
            if is_under(name, beginning):
                factor_of[parameter] = factors[beginning]
    groups = []
    for group in optimizer.param_groups:
        parts: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            parts.setdefault(factor_of[parameter], []).append(parameter)
        groups += [{**group, "params": parts[x], "lr": x * group["lr"]} for x in parts]
    optimizer.param_groups[:] = groups


def _build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
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
