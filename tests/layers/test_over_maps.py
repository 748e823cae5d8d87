"""Layers that levels share see all of them at once, or one after the other."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.layers import Conv2d
from torch import nn

from iou_d2.engine.folding import fold_norms
from iou_d2.layers import HAS_EXTENSION
from iou_d2.layers.over_maps import over_maps
from networks_to_fold import Operators, folded, shuffled

SIZES = ((16, 20), (8, 10), (4, 5))


def levels() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 64, *size, generator=generator) for size in SIZES]
    return [x.contiguous(memory_format=torch.channels_last) for x in maps]


def conv(out_channels: int = 64, **kwargs) -> Conv2d:
    return Conv2d(64, out_channels, 3, padding=1, **kwargs)


class NormsInTurn(nn.ModuleList):
    """As CycleBatchNormList of Detectron2's main branch: one for each level, in their order."""

    turn = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm, self.turn = self[self.turn], (self.turn + 1) % len(self)
        return norm(x)


def tower(*more: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(conv(), nn.ReLU(), *more, conv(80)).to(memory_format=torch.channels_last)


TOWERS = {
    "convolutions": tower,
    "group norm in a convolution": lambda: tower(conv(norm=nn.GroupNorm(4, 64)), nn.ReLU()),
    "group norm": lambda: tower(conv(bias=False), nn.GroupNorm(4, 64), nn.ReLU()),
    "batch norm": lambda: shuffled(tower(conv(bias=False), nn.BatchNorm2d(64), nn.ReLU())),
    "norms of levels": lambda: shuffled(
        tower(conv(), NormsInTurn(nn.BatchNorm2d(64) for _ in SIZES), nn.ReLU())
    ),
    "a pool": lambda: tower(nn.MaxPool2d(3, 1, 1)),
    "narrow": lambda: nn.Sequential(tower(), nn.Conv2d(80, 4, 3, padding=1)),
}


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("learns", [True, False])
def test_outputs_and_gradients_are_those_of_single_maps(name, learns):
    """In training, where batch norm takes the statistics of one map, and in inference."""
    layer = TOWERS[name]().train(learns)
    exact, fast = copy.deepcopy(layer).double(), folded(layer)
    with torch.set_grad_enabled(learns):
        wanted = [exact(x.double()) for x in levels()]
        found = over_maps(fast, levels())
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
    if not learns:
        return
    for outputs in (wanted, found):
        sum(y.square().mean() for y in outputs).backward()
    for a, b in zip(fast.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(not HAS_EXTENSION, reason="without the compiled operators")
def test_weights_are_transformed_once():
    network = folded(tower())
    with Operators() as operators:
        sum(y.sum() for y in over_maps(network, levels())).backward()
    # Of two convolutions, of which the first needs no gradient of its maps.
    counts = {"iou_d2::conv3x3": 2, "iou_d2::conv3x3_of_input": 1, "iou_d2::conv3x3_of_weight": 2}
    assert {name: operators.names.count(name) for name in counts} == counts
    assert operators.counts(["aten::convolution"]) == {"aten::convolution": 0}


def test_layers_that_are_not_folded_and_hooks_see_single_maps():
    layer = tower()
    for hooked in (layer, folded(layer)):
        for module in (hooked, hooked[0]):
            seen = []
            handle = module.register_forward_hook(
                lambda module, inputs, output, seen=seen: seen.append(output.shape[-2:])
            )
            over_maps(hooked, levels())
            handle.remove()
            assert seen == list(SIZES)
    found = over_maps(layer, levels())
    assert all(torch.equal(a, layer(x)) for a, x in zip(found, levels(), strict=True))


def test_no_maps():
    layer = shuffled(tower(nn.BatchNorm2d(64), nn.ReLU()))
    assert over_maps(layer, []) == []
    fold_norms(layer)
    assert over_maps(layer, []) == []
