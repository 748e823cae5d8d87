from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from iou_d2.engine.ema import averaged_copy, decay_after


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_the_average_against_a_loop_in_float64(decay):
    """Parameters and statistics of batch norm; the first update copies."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    average = averaged_copy(model, decay)
    wanted = None
    for t in range(30):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(2, 3, 4, 4))
        average.update_parameters(model)
        state = {name: x.double() for name, x in model.state_dict().items()}
        d = 0.0 if t == 0 else min(decay, (1 + t) / (10 + t))
        wanted = wanted or state
        wanted = {name: d * wanted[name] + (1 - d) * x for name, x in state.items()}
    for name, x in average.module.state_dict().items():
        if name == "1.num_batches_tracked":
            assert x == 30  # whole numbers are copied
        else:
            torch.testing.assert_close(x.double(), wanted[name], rtol=1e-5, atol=1e-6)


def test_the_decay_begins_low_and_ends_as_given():
    assert decay_after(0, 0.9) == 0.1 and decay_after(90, 0.999) == 0.91
    assert decay_after(10**6, 0.999) == 0.999


def test_the_copy_is_one_in_test_mode_and_leaves_the_model_alone():
    model = nn.Linear(2, 2)
    before = copy.deepcopy(model.state_dict())
    average = averaged_copy(model, 0.5)
    assert not average.training and not any(x.requires_grad for x in average.parameters())
    assert model.training and all(x.requires_grad for x in model.parameters())
    with torch.no_grad():
        average.module.weight.fill_(7)
    assert torch.equal(model.weight, before["weight"])


def test_a_forward_of_its_own_does_not_run_the_model():
    model = nn.Linear(2, 2)
    forward = model.forward
    model.forward = lambda x: forward(x)
    average = averaged_copy(model, 0.5)
    with torch.no_grad():
        average.module.weight.zero_()
        average.module.bias.fill_(3)
    assert average.module(torch.ones(1, 2)).tolist() == [[3, 3]]
