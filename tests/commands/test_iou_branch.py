"""`iou-d2 iou-branch` on planted values, and as a user runs it, on generated images."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from iou_d2 import get_config
from iou_d2.commands import iou_branch
from iou_d2.data.shapes import ShapesSpec, write_shapes
from iou_d2.detectors.iou_net_inference import Postprocessor
from iou_d2.detectors.iou_net_nms import PlainNMS


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that has not learnt anything."""
    folder = tmp_path_factory.mktemp("run")
    write_shapes(ShapesSpec("val", 3, 64, 0), folder / "shapes")
    data = f"('coco:{folder}/shapes/instances.json:{folder}/shapes/images',)"
    overrides = ["MODEL.DEVICE", "cpu", "DATASETS.TEST", data, "INPUT.MIN_SIZE_TEST", "64"]
    cfg = get_config("configs/quick/iou_net_shapes.yaml", overrides)
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, folder / "model_final.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    return folder


def test_the_report_of_planted_values():
    true = torch.linspace(0.505, 0.995, 50)
    jittered = torch.stack([true, true], dim=1)
    detected = torch.stack([1 - true, true, torch.full_like(true, 0.95)], dim=1)
    lines = iou_branch.report(jittered, detected).splitlines()
    assert lines[2].split("|")[1:4] == [" 0.5 - 0.6  ", "         10 ", " 0.550 +- 0.030 "]
    assert lines[-3] == "jittered: Pearson's r 1.000, root mean square error 0.000"
    error = (2 * true - 1).square().mean().sqrt()
    assert lines[-2] == f"detected: Pearson's r -1.000, root mean square error {error:.3f}"
    assert lines[-1] == "refinement: mean IoU 0.750 -> 0.950, share over 0.9 0.200 -> 1.000"


def test_an_untrained_branch_knows_nothing(run, capsys):
    iou_branch.main([str(run)])
    jittered, detected = capsys.readouterr().out.splitlines()[-2:]
    correlation = float(jittered.split()[3].rstrip(","))
    assert jittered.startswith("jittered: Pearson's r") and abs(correlation) < 0.5
    assert detected == "detected: 0 boxes, too few to tell"


def test_only_boxes_on_an_object_of_their_class_count():
    class Branch:
        def predict(self, features, boxes, classes, levels=None):
            return torch.tensor([0.9, 0.8, 0.7])

    class Heads:
        iou_branch = Branch()

        def levels(self, maps):
            return []

        def candidates(self, maps, proposals):
            found = Instances(
                (50, 50), pred_boxes=Boxes([[0, 0, 10, 10.0]] * 2 + [[0, 0, 10, 3.0]])
            )
            found.pred_classes = torch.tensor([1, 0, 1])
            found.scores = torch.tensor([0.9, 0.8, 0.7])
            return [found]

    def refiner(detections, branch, features):
        (found,) = detections
        found.pred_boxes.tensor[:, 3] = 5.0

    heads = Heads()
    heads.postprocessor = Postprocessor(PlainNMS(0.5), refiner=refiner)
    truth = Instances((50, 50), gt_boxes=Boxes([[0, 0, 10, 8.0]]), gt_classes=torch.tensor([1]))
    values = iou_branch.on_detected(heads, {}, [], truth)
    assert values.tolist() == [pytest.approx([0.9, 0.8, 0.625])]
