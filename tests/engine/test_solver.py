from __future__ import annotations

import pytest
import torch
from detectron2.solver import build_lr_scheduler
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


def rates(optimizer, model) -> dict[str, float]:
    rate = {id(x): group["lr"] for group in optimizer.param_groups for x in group["params"]}
    assert len(rate) == sum(len(group["params"]) for group in optimizer.param_groups)
    return {name: rate[id(x)] for name, x in model.named_parameters()}


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_the_longest_name_decides_about_the_learning_rate(name):
    model = nn.ModuleDict(
        {
            "a": nn.ModuleDict({"b": nn.Linear(1, 1), "bb": nn.Linear(1, 1)}),
            "c": nn.BatchNorm1d(1),
        }
    )
    factors = [["a.b", 0.1], ["a", 0.5], ["a.b.bias", 3]]
    keys = {"OPTIMIZER": name, "BASE_LR": 0.2, "BIAS_LR_FACTOR": 2.0}
    optimizer = build_solver(cfg_with(LR_FACTORS=factors, **keys), model)
    wanted = {"a.b.weight": 0.02, "a.b.bias": 1.2, "a.bb.weight": 0.1, "a.bb.bias": 0.2}
    wanted |= {"c.weight": 0.2, "c.bias": 0.4}
    assert rates(optimizer, model) == pytest.approx(wanted)
    for x in model.parameters():
        x.grad = torch.ones_like(x)
    before = [x.clone() for x in model.parameters()]
    optimizer.step()
    assert all(not torch.equal(x, old) for x, old in zip(model.parameters(), before))


def test_without_factors_the_groups_are_those_of_detectron2(model):
    plain = build_solver(cfg_with(), model)
    ones = build_solver(cfg_with(LR_FACTORS=[["0", 1.0]]), model)
    assert plain.state_dict() == ones.state_dict()


def test_the_schedule_multiplies_what_the_factors_gave(model):
    """One step of plain SGD at the first rate of the warm-up, computed by hand."""
    cfg = cfg_with(LR_FACTORS=[["0", 0.1]], BASE_LR=1.0, MOMENTUM=0.0, WEIGHT_DECAY=0.0)
    cfg.SOLVER.WEIGHT_DECAY_BIAS = 0.0
    cfg.SOLVER.WARMUP_FACTOR, cfg.SOLVER.WARMUP_ITERS = 0.25, 10
    optimizer = build_solver(cfg, model)
    build_lr_scheduler(cfg, optimizer)
    wanted = {name: 0.025 if name.startswith("0.") else 0.25 for name in rates(optimizer, model)}
    assert rates(optimizer, model) == pytest.approx(wanted)
    before = model[0].weight.clone()
    for x in model.parameters():
        x.grad = torch.ones_like(x)
    optimizer.step()
    torch.testing.assert_close(model[0].weight, before - 0.025)


def test_a_factor_of_no_parameter_is_refused_with_the_nearest(model):
    with pytest.raises(ValueError, match="SOLVER.LR_FACTORS names '0.wight', .* 0.weight"):
        build_solver(cfg_with(LR_FACTORS=[["0.wight", 0.1]]), model)


def test_factors_of_the_command_line_and_of_a_file(tmp_path):
    pairs = [["backbone.bottom_up", 0.1], ["head", 2]]
    overrides = ["SOLVER.LR_FACTORS", "[['backbone.bottom_up', 0.1], ('head', 2)]"]
    by_command = get_config("", [*overrides, "SOLVER.FREEZE", "['backbone']"])
    path = tmp_path / "a.yaml"
    path.write_text("SOLVER: {LR_FACTORS: [[backbone.bottom_up, 0.1], [head, 2]]}")
    assert dict(by_command.SOLVER.LR_FACTORS) == dict(get_config(path).SOLVER.LR_FACTORS)
    assert [list(x) for x in by_command.SOLVER.LR_FACTORS] == pairs
    assert by_command.SOLVER.FREEZE == ["backbone"]


def test_a_training_within_its_warm_up_is_told(model, caplog):
    build_solver(cfg_with(MAX_ITER=101, WARMUP_ITERS=100), model)
    assert not caplog.records
    build_solver(cfg_with(MAX_ITER=100, WARMUP_ITERS=100), model)
    assert "Training ends after 100 iterations, within its warm-up of 100" in caplog.text
