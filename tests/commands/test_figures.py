"""`iou-d2 figures` as a user runs it, on a few images and random weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from PIL import Image

from iou_d2 import build_predictor, get_config
from iou_d2.commands import eval as evaluate
from iou_d2.commands import figures
from iou_d2.errors import InputError

CONFIG = "configs/quick/iou_net_shapes.yaml"
SIDE = 64
SMALL = (
    *("MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", "96", "DATALOADER.NUM_WORKERS", "0"),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", "30", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
    *("MODEL.ROI_HEADS.NUM_CLASSES", "2", "MODEL.RETINANET.NUM_CLASSES", "2"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "32", "TEST.EXPECTED_RESULTS", "[]"),
    *("TEST.DETECTIONS_PER_IMAGE", "40"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The weights of an IoU-Net that has not learnt anything, and six images whose objects are some
    of its detections, so that its AP is not 0: one black, one without annotations, one with a
    crowd."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    torch.manual_seed(0)
    cfg = get_config(CONFIG, [*SMALL, "MODEL.WEIGHTS", ""])
    model = build_model(cfg)
    torch.nn.init.normal_(model.roi_heads.iou_branch.iou_pred.weight, std=0.5)
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.5)
    names = ["cat", "dog"]
    torch.save({"model": model.state_dict(), "class_names": names}, folder / "model.pth")
    predict = build_predictor(
        get_config(CONFIG, [*SMALL, "MODEL.WEIGHTS", str(folder / "model.pth")])
    )
    generator = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(6):
        pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        pixels = Image.fromarray(pixels * (number != 4)).resize((SIDE, SIDE))
        pixels.save(folder / f"images/{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": SIDE, "height": SIDE})
        found = predict(read_image(folder / f"images/{number}.png", "BGR"))["instances"]
        for row in range(0, len(found) if number < 4 else 0, 6):
            x1, y1, x2, y2 = found.pred_boxes.tensor[row].tolist()
            box = [x1, y1, x2 - x1, (y2 - y1) * generator.uniform(0.7, 1)]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "bbox": box,
                 "category_id": int(found.pred_classes[row]) + 1, "area": box[2] * box[3],
                 "iscrowd": int(row == 0 and number == 3)}
            )  # fmt: skip
    categories = [{"id": k, "name": name} for k, name in enumerate(names, 1)]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "empty.json").write_text(json.dumps({**truth, "annotations": []}))
    del truth["annotations"]
    (folder / "none.json").write_text(json.dumps(truth))
    return folder


def arguments(data, truth="truth.json"):
    return (
        *("--test", f"coco:{data / truth}:{data / 'images'}", *SMALL),
        *("MODEL.WEIGHTS", str(data / "model.pth")),
    )


def run(data, output, *options, truth="truth.json", config=CONFIG):
    words = ("--config", config, "--output", str(output), *options, *arguments(data, truth))
    figures.main([*words, "OUTPUT_DIR", str(output / "run")])
    return json.loads((output / "figures.json").read_text())


def test_all_is_drawn_and_the_detectors_own_steps_have_the_ap_of_eval(data, tmp_path, capsys):
    numbers = run(data, tmp_path, "--steps", "6")
    names = ["boxes_by_iou", "recall_by_iou", "refinement", "rivals", "paths"]
    printed = capsys.readouterr().out
    for name in names:
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert f"{name}.png" in printed
    assert (numbers["images"], numbers["left_out"]) == (6, {})
    truth = json.loads((data / "truth.json").read_text())
    assert numbers["objects"] == sum(not a["iscrowd"] for a in truth["annotations"]) > 10

    by_step = numbers["refinement"]["ascent"]
    for steps in (5, 2):
        output = tmp_path / f"eval{steps}"
        asked = ("MODEL.IOU_NET.REFINE_STEPS", str(steps), "OUTPUT_DIR", str(output))
        evaluate.main(["--num-gpus", "0", "--config", CONFIG, *arguments(data), *asked])
        results = json.loads((output / "evaluation.json").read_text())["results"]
        for metric in ("AP", "AP50", "AP75", "AP90"):
            expected = results[f"bbox/{metric}"]
            assert by_step[metric][steps] == pytest.approx(expected, abs=1e-9), metric
        assert results["bbox/AP"] > 1
    assert len(by_step["AP"]) == len(numbers["refinement"]["regression"]["true_iou"]) == 7
    # Without a step the two are the same, and what the NMS of the detector leaves.
    for metric in ("AP", "AP90", "true_iou", "predicted_iou"):
        first = by_step[metric][0]
        assert numbers["refinement"]["regression"][metric][0] == pytest.approx(first, abs=1e-6)
    assert numbers["nms"]["iou_nms"]["AP"] == pytest.approx(by_step["AP"][0], abs=1e-9)

    nms = numbers["nms"]
    assert list(nms) == ["none", "nms", "soft_nms", "iou_nms"]
    for part in nms.values():
        assert sum(part["boxes_by_iou"]) <= part["boxes"] <= nms["none"]["boxes"]
        assert part["recall"] == sorted(part["recall"], reverse=True)
        assert all(a <= b + 1e-9 for a, b in zip(part["boxes_by_iou"], nms["none"]["boxes_by_iou"]))


def test_a_part_of_the_images(data, tmp_path):
    numbers = run(data, tmp_path, "--images", "2", "--steps", "0", "--panels", "1")
    assert numbers["images"] == 2
    assert len(numbers["refinement"]["ascent"]["AP"]) == 1
    assert not (tmp_path / "paths.png").exists()


@pytest.mark.parametrize(("name", "lacks"), [("faster_rcnn", True), ("iou_retinanet", False)])
def test_of_other_detectors_what_has_a_meaning(data, tmp_path, capsys, name, lacks):
    config = f"configs/quick/{name}_shapes.yaml"
    torch.manual_seed(0)
    model = build_model(get_config(config, [*SMALL, "MODEL.WEIGHTS", ""]))
    path = tmp_path / "model.pth"
    torch.save({"model": model.state_dict(), "class_names": ["cat", "dog"]}, path)
    low = ("MODEL.RETINANET.SCORE_THRESH_TEST", "0.0", "MODEL.RETINANET.TOPK_CANDIDATES_TEST", "50")
    words = ("--config", config, "--output", str(tmp_path), *arguments(data), *low)
    figures.main([*words, "MODEL.WEIGHTS", str(path), "OUTPUT_DIR", str(tmp_path / "run")])
    numbers = json.loads((tmp_path / "figures.json").read_text())
    printed = capsys.readouterr().out
    assert ("iou_nms is left out: no IoU of candidates is predicted." in printed) == lacks
    assert "refinement is left out: there is no IoU branch" in printed
    assert ("iou_nms" in numbers["nms"]) != lacks and numbers["refinement"] == {}
    assert numbers["rivals"]["signal"] == ("true IoU" if lacks else "predicted IoU")
    assert not (tmp_path / "refinement.png").exists()
    assert (tmp_path / "recall_by_iou.png").is_file()


@pytest.mark.parametrize(
    ("options", "truth", "sentence"),
    [
        ((), "none.json", "has no annotations: there is no truth to compare with"),
        ((), "empty.json", "has no object that boxes could be compared with"),
        (("--images", "0"), "truth.json", "--images is at least 1"),
        (("--steps", "-1"), "truth.json", "--steps is at least 0"),
    ],
)
def test_what_is_wrong_is_told(data, tmp_path, options, truth, sentence):
    with pytest.raises(InputError, match=sentence):
        run(data, tmp_path, *options, truth=truth)
    assert not (tmp_path / "figures.json").exists()
