from __future__ import annotations

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone

QUICK = "configs/quick/iou_retinanet_shapes.yaml"


def test_levels_have_the_strides_and_channels_they_declare(small_cfg):
    backbone = build_backbone(small_cfg(QUICK), ShapeSpec(channels=3))
    features = backbone(torch.zeros(1, 3, 128, 192))
    assert list(features) == ["p3", "p4", "p5", "p6"]
    for name, shape in backbone.output_shape().items():
        expected = (1, shape.channels, 128 // shape.stride, 192 // shape.stride)
        assert features[name].shape == expected
    assert [shape.stride for shape in backbone.output_shape().values()] == [8, 16, 32, 64]


def test_every_parameter_trains(small_cfg):
    backbone = build_backbone(small_cfg(QUICK), ShapeSpec(channels=3)).train()
    features = backbone(torch.randn(2, 3, 64, 64))
    sum(feature.square().sum() for feature in features.values()).backward()
    # Ten layers with weights, counting neither shortcuts nor the FPN: a stem, four blocks of two,
    # and the classifier, which a detector leaves out.
    weights = [n for n, p in backbone.bottom_up.named_parameters() if n.endswith("conv1.weight")]
    assert len(weights) == 5
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backbone.parameters())
