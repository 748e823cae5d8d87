"""The one seam through every dense detector, and that of IoU-Net's heads."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model

from dense_detectors import DENSE
from iou_d2.detectors.dense import DenseDetector, rescale_detections

# So that random weights detect something.
EVERYTHING = (
    *("MODEL.RETINANET.SCORE_THRESH_TEST", "0.0", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
    *("MODEL.ROI_HEADS.NUM_CLASSES", "3"),
)


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert len(a["instances"]) > 5
        for name, value in b["instances"].get_fields().items():
            other = a["instances"].get(name)
            both = (other, value) if torch.is_tensor(value) else (other.tensor, value.tensor)
            assert torch.equal(*both), name


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_detector_is_predict_and_then_losses_or_detect(
    small_cfg, make_batch, event_storage, name
):
    torch.manual_seed(0)
    model = build_model(small_cfg(f"configs/quick/{name}.yaml", *EVERYTHING))
    assert isinstance(model, DenseDetector)
    batch = make_batch([3, 0])
    batch[1]["height"] = 200
    model.train()
    images = model.preprocess_image(batch)
    truth = [x["instances"] for x in batch]
    found = model.losses(model.predict(images.tensor), images.image_sizes, truth)
    # RetinaNet's normaliser is a running mean, and batch norm's statistics do not count here.
    model.loss_normalizer = 100.0
    assert {k: v.item() for k, v in found.items()} == {k: v.item() for k, v in model(batch).items()}

    model.eval()
    with torch.no_grad():
        detections = model.detect(model.predict(images.tensor), images.image_sizes)
        assert_same(rescale_detections(detections, batch), model(batch))


def test_iou_net_is_candidates_and_then_detect(small_cfg, make_batch):
    torch.manual_seed(0)
    model = build_model(small_cfg("configs/quick/iou_net_shapes.yaml", *EVERYTHING)).eval()
    batch = make_batch([0, 0])
    with torch.no_grad():
        images = model.preprocess_image(batch)
        features = model.backbone(images.tensor)
        proposals, _ = model.proposal_generator(images, features, None)
        candidates = model.roi_heads.candidates(features, proposals)
        detections = model.roi_heads.detect(features, candidates)
        assert_same(rescale_detections(detections, batch), model(batch))
