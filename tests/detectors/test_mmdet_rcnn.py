"""The converter, the configs in mmdet/ and our heads against mmdetection's R-CNNs by hand."""

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
from rcnn_by_hand import MMDetRCNN
from torchvision_rcnn import CLASSES, THIN

SIZE = (128, 160)
MODELS = {
    "mmdet/faster_rcnn_R_50_FPN": (False, False),
    "mmdet/mask_rcnn_R_50_FPN": (False, True),
    "mmdet/cascade_rcnn_R_50_FPN": (True, False),
    "mmdet/cascade_mask_rcnn_R_50_FPN": (True, True),
}


@pytest.fixture
def image():
    generator = torch.Generator().manual_seed(1)
    return {"image": torch.randint(256, (3, *SIZE), generator=generator, dtype=torch.uint8)}


def converted(state, config, folder):
    """Our model with the weights of `state`, by way of the converter, and its file."""
    theirs, ours = str(folder / "mmdet.pth"), str(folder / "ours.pth")
    torch.save({"state_dict": state, "meta": {}}, theirs)
    options = ["--config-file", config, "--opts", *THIN]
    convert([theirs, ours, "--from", "mmdet", "--to", "detectron2", "--force", *options])
    model = build_model(get_config(config, THIN)).eval()
    DetectionCheckpointer(model).load(ours)
    return model, ours


@torch.no_grad()
def by_hand(state, model, image):
    """The peer, on the features of our backbone."""
    images = model.preprocess_image([image])
    return MMDetRCNN(state, list(model.backbone(images.tensor).values()), SIZE)


@pytest.mark.parametrize("config", MODELS)
def test_detections(tmp_path, capsys, image, config):
    cascade, mask = MODELS[config]
    state = mmdet_rcnn_state(cascade, mask)
    model, _ = converted(state, config, tmp_path)
    printed = capsys.readouterr().out
    assert not any(x in printed for x in ("Left over", "not filled", "Not in the model"))
    assert ("configs mmdet/cascade_*" in printed) == cascade == ("Changed" in printed)
    peer = by_hand(state, model, image)
    for stage, logits in zip(peer.stages, peer.logits()):  # so that no class wins everywhere
        state[f"roi_head.bbox_head{stage}.fc_cls.bias"] -= logits.mean(dim=0).float()

    model, _ = converted(state, config, tmp_path)
    peer = by_hand(state, model, image)
    with torch.no_grad():
        found = model.inference([image], do_postprocess=False)[0]
    boxes, scores, classes = peer.detect()
    assert len(found) > 50 and set(found.pred_classes.tolist()) == set(range(CLASSES))
    pairs = paired(found, boxes, scores, classes)
    if mask:
        masks = peer.masks(boxes, classes)[pairs]
        torch.testing.assert_close(found.pred_masks[:, 0], masks, atol=1e-3, rtol=0)


@pytest.mark.parametrize("config", MODELS)
def test_there_and_back(tmp_path, config):
    state = mmdet_rcnn_state(*MODELS[config])
    _, ours = converted(state, config, tmp_path)
    back = str(tmp_path / "back.pth")
    convert([ours, back, "--from", "detectron2", "--to", "mmdet"])
    assert_same(read(back)["state_dict"], state)
