"""What the tests of weights from files share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import nn

CONFIG = "configs/vfnet_R_50_FPN_1x.yaml"
SMALL = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "16"),
    *("MODEL.RESNETS.NUM_GROUPS", "4", "MODEL.RESNETS.WIDTH_PER_GROUP", "2"),
    *("MODEL.FPN.OUT_CHANNELS", "16", "MODEL.POINT_DETECTOR.NUM_GROUPS", "4"),
    *("MODEL.RETINANET.NUM_CLASSES", "3"),
]
DEFORMABLE = [
    *("MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[False,True,True,True]"),
    *("MODEL.RESNETS.DEFORM_MODULATED", "True", "MODEL.POINT_DETECTOR.DEFORMABLE_TOWER", "True"),
]


def read(path):
    return torch.load(path, weights_only=True)


def assert_same(state, wanted):
    """Bit for bit, and the same names."""
    assert state.keys() == wanted.keys()
    for name, x in wanted.items():
        assert state[name].dtype == x.dtype and torch.equal(state[name], x), name


@contextlib.contextmanager
def nothing_drawn() -> Iterator[None]:
    """Within it weights begin with what their memory holds. Drawing those of a large model takes
    seconds, and is for nothing where a file replaces them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("kaiming_uniform_", "kaiming_normal_"):
            patch.setattr(nn.init, name, lambda tensor, *args, **options: tensor)
        yield
