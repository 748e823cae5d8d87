"""`iou-d2 oracle` as a user runs it, on a few images and random weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from computing import dtypes_of_convolutions
from iou_d2 import get_config
from iou_d2.commands import oracle
from iou_d2.errors import InputError

CONFIG = "configs/quick/atss_shapes.yaml"
SIDE = 64


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four images, three of them with one object, which the test size makes twice as large; and
    the weights of a detector that has not learnt anything."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    generator = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(4):
        pixels = generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": SIDE, "height": SIDE})
    for number in range(3):
        box = [4 + 3 * number, 7, 30, 24 + 5 * number]
        annotations.append(
            {"id": number + 1, "image_id": number, "category_id": number % 2 + 1, "bbox": box,
             "area": box[2] * box[3], "iscrowd": 0}
        )  # fmt: skip
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "unlabelled.json").write_text(json.dumps({**truth, "annotations": []}))
    del truth["annotations"]
    (folder / "none.json").write_text(json.dumps(truth))
    cfg = get_config(CONFIG, ["MODEL.DEVICE", "cpu", "MODEL.RETINANET.NUM_CLASSES", "2"])
    torch.manual_seed(0)
    model = {"model": build_model(cfg).state_dict(), "class_names": ["cat", "dog"]}
    torch.save(model, folder / "model.pth")
    return folder


def run(data, output, *options, truth="truth.json", config=CONFIG):
    oracle.main(
        [
            *("--config", config, "--test", f"coco:{data / truth}:{data / 'images'}"),
            *("--output", str(output), *options, "MODEL.DEVICE", "cpu"),
            *("MODEL.WEIGHTS", str(data / "model.pth"), "INPUT.MIN_SIZE_TEST", "128"),
            *("OUTPUT_DIR", str(output / "run"), "DATALOADER.NUM_WORKERS", "0"),
        ]
    )
    return json.loads((output / "oracle.json").read_text())


def test_true_boxes_of_the_true_class_have_an_ap_of_100(data, tmp_path, capsys):
    found = run(data, tmp_path, "--oracles", "gt_bbox+gt_cls", "gt_iou_rank")
    rows = {(row["replaced"], row["with_quality"]): row["bbox"] for row in found["rows"]}
    # What is not an object has a class score of 0.01.
    assert rows["gt_bbox+gt_cls", False]["AP"] == rows["gt_bbox+gt_cls", True]["AP"] == 100
    assert rows["gt_bbox+gt_cls", False]["AP90"] == 100 and rows["nothing", True]["AP"] is None
    assert list(found["left_out"]) == ["gt_iou_rank"]
    assert (tmp_path / "oracle.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "gt_bbox+gt_cls" / "coco_instances_results.json").is_file()
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:4]] for line in lines]
    assert ["gt_bbox+gt_cls", "class score", "100.0"] in cells
    assert "gt_iou_rank has no meaning: IoU-guided NMS is that of two-stage detectors." in lines


def test_all_oracles_are_the_default(data, tmp_path):
    found = run(data, tmp_path)
    names = ["nothing", "gt_ctr", "gt_ctr_iou", "gt_bbox", "gt_cls", "gt_cls_iou"]
    assert list(dict.fromkeys(row["replaced"] for row in found["rows"])) == names
    assert len(found["rows"]) == 10


@pytest.mark.parametrize(
    ("options", "truth", "sentence"),
    [
        (("--oracles", "gt_box"), "truth.json", "--oracles has 'gt_box'"),
        ((), "none.json", "has no annotations"),
        (("--test", "shapes_val_3x64"), "truth.json", "DATASETS.TEST names 2 datasets"),
    ],
)
def test_what_is_wrong_is_named(data, tmp_path, options, truth, sentence):
    with pytest.raises(InputError, match=sentence):
        run(data, tmp_path, *options, truth=truth)


def test_without_any_object_nothing_is_defined(data, tmp_path, capsys):
    found = run(data, tmp_path, "--oracles", "gt_cls", truth="unlabelled.json")
    assert all(row["bbox"]["AP"] is None for row in found["rows"])


def test_the_networks_compute_in_the_precision_of_the_config(data, tmp_path):
    for precision in ("float32", "bfloat16"):
        with dtypes_of_convolutions() as dtypes:
            run(data, tmp_path, "--oracles", "gt_cls", "MODEL.PRECISION", precision)
        assert dtypes == {getattr(torch, precision)}
