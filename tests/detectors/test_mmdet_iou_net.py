"""IoU-Net of thisisi3/OpenMMLab-IoUNet in ours: its names, and what it does up to refinement, by
hand. Its files are not at hand; these are made of its documented names."""

from __future__ import annotations

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from checkpoint_helpers import assert_same, read
from detections import paired
from iou_d2 import get_config
from iou_d2.commands.convert import main as convert
from mmdet_rcnn import mmdet_rcnn_state
from prroi_pool_by_hand import oracle as prroi_pool
from rcnn_by_hand import STRIDES, MMDetRCNN, level_of, overlaps
from torchvision_rcnn import CLASSES, THIN

SIZE = (96, 128)
CONFIGS = {"mmdet/iou_net_R_50_FPN": "smooth_l1", "mmdet/iou_net_R_50_FPN_bce": "bce"}
PROPOSALS = 50
# Their refinement looks for the level of a box at every step.
SETTINGS = ("MODEL.IOU_NET.REFINE_STEPS", "0", "MODEL.RPN.POST_NMS_TOPK_TEST", str(PROPOSALS))


class TheirIoUNet(MMDetRCNN):
    def pool(self, boxes, side):
        pooled = []
        for box in boxes:
            level = level_of(box)
            rois = [[0, *box.tolist()]]
            found = prroi_pool(self.features[level], rois, (side, side), 1 / STRIDES[level])
            pooled.append(torch.from_numpy(found))
        return torch.cat(pooled)

    def ious(self, boxes, loss):
        """(R, K)."""
        x = self.pool(boxes, 7).flatten(1)
        for index in (0, 1):
            x = self.layer(f"roi_head.iou_head.shared_fcs.{index}", x).relu()
        x = self.layer("roi_head.iou_head.fc_iou", x)
        return x.sigmoid() if loss == "bce" else x * 0.5 + 0.5

    def detect_by_iou(self, loss):
        boxes, (logits,) = self.boxes_and_logits()
        scores = logits.softmax(dim=1)[:, :-1]
        boxes = boxes[torch.arange(len(boxes)), scores.argmax(dim=1)]
        ious = self.ious(boxes, loss)
        found = []
        for k in range(CLASSES):
            left = [i for i in ious[:, k].argsort(descending=True).tolist() if scores[i, k] >= 0.05]
            while left:
                best = left[0]
                group = [i for i in left if i == best or overlaps(boxes[best], boxes[i]) > 0.5]
                found.append((boxes[best], max(scores[i, k] for i in group), k, ious[best, k]))
                left = [i for i in left if i not in group]
        found = sorted(found, key=lambda x: -x[1].item())[:100]
        boxes, scores, classes, ious = zip(*found)
        scores = torch.stack(scores) * torch.stack(ious)
        return torch.stack(boxes).float(), scores.float(), torch.tensor(classes)


def converted(state, config, folder):
    theirs, ours = str(folder / "mmdet.pth"), str(folder / "ours.pth")
    torch.save({"state_dict": state, "meta": {}}, theirs)
    options = ["--config-file", config, "--opts", *THIN]
    convert([theirs, ours, "--from", "mmdet", "--to", "detectron2", "--force", *options])
    model = build_model(get_config(config, [*THIN, *SETTINGS])).eval()
    DetectionCheckpointer(model).load(ours)
    return model, ours


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS)
def test_detections_before_refinement(tmp_path, capsys, config):
    generator = torch.Generator().manual_seed(1)
    image = {"image": torch.randint(256, (3, *SIZE), generator=generator, dtype=torch.uint8)}
    state = mmdet_rcnn_state(False, False, iou=True)
    for again in (False, True):
        model, _ = converted(state, config, tmp_path)
        images = model.preprocess_image([image])
        peer = TheirIoUNet(state, list(model.backbone(images.tensor).values()), SIZE, PROPOSALS)
        if not again:  # so that no class wins everywhere
            state["roi_head.bbox_head.fc_cls.bias"] -= peer.logits()[0].mean(dim=0).float()
    printed = capsys.readouterr().out
    assert not any(x in printed for x in ("Left over", "not filled", "Not in the model"))
    assert "no number, but MODEL.IOU_NET.LOSS_TYPE" in printed
    found = model.inference([image], do_postprocess=False)[0]
    assert len(found) > 20 and set(found.pred_classes.tolist()) == set(range(CLASSES))
    paired(found, *peer.detect_by_iou(CONFIGS[config]))


def test_there_and_back(tmp_path):
    state = mmdet_rcnn_state(False, False, iou=True)
    _, ours = converted(state, "mmdet/iou_net_R_50_FPN", tmp_path)
    back = str(tmp_path / "back.pth")
    convert([ours, back, "--from", "detectron2", "--to", "mmdet"])
    assert_same(read(back)["state_dict"], state)
