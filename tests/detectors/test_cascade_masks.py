from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances

CONFIG = "configs/mmdet/cascade_mask_rcnn_R_50_FPN.yaml"
SMALL = (
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8"),
    *("MODEL.ROI_HEADS.NUM_CLASSES", "3", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16"),
    *("MODEL.RESNETS.NORM", "BN"),
)


@pytest.fixture
def model(small_cfg):
    torch.manual_seed(0)
    return build_model(small_cfg(CONFIG, *SMALL))


@pytest.mark.parametrize("objects", [[3, 2], [0, 4], [0, 0]], ids=str)
def test_every_stage_learns_masks(model, make_batch, event_storage, objects):
    batch = make_batch(objects)
    for image in batch:
        shape = len(image["instances"]), *image["image"].shape[1:]
        image["instances"].gt_masks = BitMasks(torch.ones(shape, dtype=torch.bool))
    loss = model.train()(batch)["loss_mask"]
    loss.backward()
    assert torch.isfinite(loss) and (loss > 0) == (sum(objects) > 0)
    for stage in model.roi_heads.mask_head.stages:
        for parameter in stage.parameters():
            assert parameter.grad is not None
            if sum(objects):
                assert (stage.predictor.weight.grad != 0).any()


@torch.no_grad()
@pytest.mark.parametrize("counts", [(2, 0), (0, 0), (1, 3)], ids=str)
def test_masks_are_the_mean_of_the_stages(model, counts):
    head = model.eval().roi_heads.mask_head
    x = torch.randn(sum(counts), 32, 14, 14)
    instances = []
    for count in counts:
        classes = torch.arange(count) % 3
        boxes = Boxes(torch.zeros(count, 4))
        instances.append(Instances((9, 9), pred_boxes=boxes, pred_classes=classes))
    classes = torch.cat([y.pred_classes for y in instances])
    logits = [stage.layers(x)[torch.arange(len(x)), classes] for stage in head.stages]
    expected = torch.stack(logits).sigmoid().mean(dim=0)[:, None]
    found = head(x, instances)
    torch.testing.assert_close(torch.cat([y.pred_masks for y in found]), expected)
    assert [len(y.pred_masks) for y in found] == list(counts)
