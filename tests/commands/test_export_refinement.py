"""`iou-d2 export --with refinement`."""

from __future__ import annotations

import pytest
import torch

from exported_models import SMALL_TWO_STAGE, small_two_stage
from iou_d2.commands import export

pytest.importorskip("onnx")

CONFIG = "configs/quick/iou_net_standalone_shapes.yaml"


def test_the_command_writes_and_checks_it(tmp_path, capsys):
    _, model = small_two_stage(CONFIG)
    model.roi_heads.iou_branch.iou_pred.weight.data *= 0.3
    weights, path = str(tmp_path / "model.pth"), str(tmp_path / "model.pt")
    torch.save({"model": model.state_dict(), "class_names": ["a", "b", "c"]}, weights)
    pairs = [*SMALL_TWO_STAGE, "MODEL.WEIGHTS", weights, "MODEL.IOU_NET.REFINE_STEPS", "1"]
    options = ["--with", "refinement", "--format", "torchscript"]
    export.main(["--config", CONFIG, "--output", path, *options, *pairs])
    printed = capsys.readouterr().out
    assert "pred_ious, counts of images, given_boxes, given_scores, given_classes." in printed
    assert "It and the model agree about" in printed
