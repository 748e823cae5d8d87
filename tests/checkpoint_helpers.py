"""What the tests of `iou-d2 convert` share."""

from __future__ import annotations

import torch

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
