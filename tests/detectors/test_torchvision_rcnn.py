"""The converter, the configs in torchvision/ and our heads against torchvision's own models, with
few channels and random weights."""

from __future__ import annotations

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from iou_d2 import get_config
from iou_d2.commands.convert import main as convert
from torchvision_rcnn import CLASSES, THIN, build_torchvision_rcnn

# Of 3 and 4 rows in p6, which no stride of 64 gives, and unequal in a batch.
SIZES = ((160, 224), (224, 192))
MODELS = [
    (1, False, "torchvision/faster_rcnn_R_50_FPN"),
    (2, False, "torchvision/faster_rcnn_R_50_FPN_v2"),
    (1, True, "torchvision/mask_rcnn_R_50_FPN"),
    (2, True, "torchvision/mask_rcnn_R_50_FPN_v2"),
]
EVERYTHING = 100_000  # a sample of that size is all there is


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8) for size in SIZES
    ]


def converted(theirs, config, folder, *overrides):
    """Our model with the weights of `theirs`, by way of the converter, which must fill it."""
    source, target = str(folder / "theirs.pth"), str(folder / "ours.pth")
    torch.save(theirs.state_dict(), source)
    options = ["--config-file", config, "--opts", *THIN, *overrides]
    convert([source, target, "--from", "torchvision", "--to", "detectron2", *options])
    model = build_model(get_config(config, [*THIN, *overrides]))
    DetectionCheckpointer(model).load(target)
    return model.eval(), target


@pytest.mark.parametrize(("version", "mask", "config"), MODELS)
def test_detections(tmp_path, capsys, images, version, mask, config):
    theirs = build_torchvision_rcnn(version, mask)
    theirs.transform.postprocess = lambda found, *sizes: found  # masks as the head gives them
    ours, target = converted(theirs, config, tmp_path)
    printed = capsys.readouterr().out
    assert not any(x in printed for x in ("Left over", "not filled", "Not in the model"))
    with torch.no_grad():
        expected = theirs([x / 255 for x in images])
        found = ours.inference([{"image": x} for x in images], do_postprocess=False)
    for one, other in zip(found, expected):
        assert len(one) == len(other["scores"]) > 20
        torch.testing.assert_close(one.scores, other["scores"], atol=1e-4, rtol=0)
        torch.testing.assert_close(one.pred_boxes.tensor, other["boxes"], atol=0.05, rtol=0)
        assert torch.equal(one.pred_classes, other["labels"] - 1)
        assert set(one.pred_classes.tolist()) == set(range(CLASSES))
        if mask:
            torch.testing.assert_close(one.pred_masks, other["masks"], atol=1e-4, rtol=0)
