from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes

from excited import excite
from iou_d2.detectors import iou_branch

ALIGN = ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2", "MODEL.IOU_NET.REFINE_STEPS", "0")


@pytest.mark.parametrize("pooler", [(), ALIGN])
def test_boxes_are_judged_by_level_and_some_at_a_time_with_the_same_result(
    small_cfg, monkeypatch, pooler
):
    """Against one pass of the layers over all boxes, as they come."""
    torch.manual_seed(0)
    cfg = small_cfg("configs/quick/iou_net_shapes.yaml", *pooler)
    model = excite(build_model(cfg)).eval()
    branch = model.roi_heads.iou_branch
    features = model.roi_heads.levels(model.backbone(torch.rand(3, 3, 96, 96)))
    features = [feature.detach() for feature in features]
    corner = torch.rand(90, 2) * 60
    boxes = torch.cat([corner, corner + 2 + 200 * torch.rand(90, 2) ** 4], dim=1)
    classes = torch.randint(branch.iou_pred.out_features, (90,))
    lists = [slice(0, 50), slice(50, 50), slice(50, 90)]

    def judged(predict):
        moving = boxes.clone().requires_grad_(not pooler)
        ious = predict(features, [Boxes(moving[x]) for x in lists], classes)
        return ious, None if pooler else torch.autograd.grad(ious.sum(), moving)[0]

    expected = judged(lambda *inputs: (branch(*inputs) + 1) / 2)
    assert expected[0].std() > 1e-3
    for size in (512, 7):
        monkeypatch.setattr(iou_branch, "_CPU_BOXES", size)
        torch.testing.assert_close(judged(branch.predict), expected, rtol=1e-4, atol=1e-6)
    assert branch.predict(features, [Boxes(boxes[:0])] * 3, classes[:0]).shape == (0,)
