from __future__ import annotations

import pytest
import torch
from torch import nn

from iou_d2 import get_config
from iou_d2.engine.solver import build_solver


def cfg_with(**solver):
    cfg = get_config()
    for key, value in solver.items():
        cfg.SOLVER[key] = value
    return cfg


@pytest.fixture
def model():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


def test_sgd_is_the_default(model):
    assert isinstance(build_solver(cfg_with(), model), torch.optim.SGD)


def test_adamw_takes_the_solver_keys(model):
    keys = {"WEIGHT_DECAY": 0.1, "WEIGHT_DECAY_NORM": 0.2, "WEIGHT_DECAY_BIAS": 0.3}
    optimizer = build_solver(cfg_with(OPTIMIZER="AdamW", BASE_LR=0.5, **keys), model)
    assert isinstance(optimizer, torch.optim.AdamW)
    decay = {
        id(parameter): group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    assert [decay[id(p)] for p in model.parameters()] == [0.1, 0.3, 0.2, 0.3]


def test_gradients_are_clipped_where_asked(model):
    clip = {"ENABLED": True, "CLIP_TYPE": "value", "CLIP_VALUE": 0.25}
    cfg = cfg_with(OPTIMIZER="AdamW")
    cfg.SOLVER.CLIP_GRADIENTS.update(clip)
    optimizer = build_solver(cfg, model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    optimizer.step()
    assert all(parameter.grad.eq(0.25).all() for parameter in model.parameters())


def test_an_unknown_optimizer_is_named(model):
    with pytest.raises(ValueError, match="'SGD' or 'AdamW', but it is 'Lion'"):
        build_solver(cfg_with(OPTIMIZER="Lion"), model)
