"""Weights of Detectron2's model zoo in the R-CNN heads of iou_d2."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

IOU_NET = "configs/quick/iou_net_shapes.yaml"
CASCADE = ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True")
ALIGN = ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2")  # Detectron2's heads know no other


@pytest.mark.parametrize(
    ("theirs", "ours", "aware"),
    [
        ("StandardROIHeads", "BoxLossROIHeads", False),
        ("StandardROIHeads", "IoUNetROIHeads", True),
        ("CascadeROIHeads", "BoxLossCascadeROIHeads", False),
        ("CascadeROIHeads", "IoUNetCascadeROIHeads", True),
    ],
)
@pytest.mark.parametrize("mask", ["False", "True"])
def test_zoo_weights_load_and_only_the_iou_branch_is_new(
    small_cfg, tmp_path, theirs, ours, aware, mask
):
    def build(*overrides):
        cascade = CASCADE if "Cascade" in theirs else ()
        return build_model(small_cfg(IOU_NET, "MODEL.MASK_ON", mask, *cascade, *overrides))

    plain = build("MODEL.ROI_HEADS.NAME", theirs, *ALIGN)
    weights = {name: value.numpy() for name, value in plain.state_dict().items()}
    path = tmp_path / "model_final.pkl"
    # The format of Detectron2's model zoo.
    path.write_bytes(pickle.dumps({"model": weights, "__author__": "Detectron2 Model Zoo"}))
    model = build("MODEL.ROI_HEADS.NAME", ours)
    checkpointer = DetectionCheckpointer(model)
    loaded = checkpointer._load_model(checkpointer._load_file(str(path)))
    layers = ("head.fc1", "head.fc2", "iou_pred") if aware else ()
    expected = [f"roi_heads.iou_branch.{x}.{y}" for x in layers for y in ("bias", "weight")]
    assert sorted(loaded.missing_keys) == expected and loaded.unexpected_keys == []
    for name, value in weights.items():
        assert np.array_equal(model.state_dict()[name].numpy(), value), name
