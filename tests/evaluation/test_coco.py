"""The COCO evaluator against Detectron2's own, planted cases, and in two processes."""

import json
import math

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator, print_csv_format, verify_results
from detectron2.structures import Boxes, BoxMode, Instances

from iou_d2.analysis import localization_table, read_records
from iou_d2.evaluation import COCOLocalizationEvaluator
from iou_d2.evaluation.coco import file_stem
from random_coco import make_random_coco


def forget(name):
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def register(tmp_path):
    """Register a COCO dict under a name, in place of an earlier one; forget it after the test."""
    names = []

    def _register(name, ground_truth):
        forget(name)
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"info": {}, **ground_truth}))
        names.append(name)
        register_coco_instances(name, {}, str(path), str(tmp_path))
        DatasetCatalog.get(name)  # sets the class names and ids, as a data loader does
        return path

    yield _register
    for name in names:
        forget(name)


def predict(ground_truth, results):
    """The inputs and outputs of a model that finds `results`, one image at a time."""
    index = {c["id"]: k for k, c in enumerate(ground_truth["categories"])}
    for image in ground_truth["images"]:
        found = [r for r in results if r["image_id"] == image["id"]]
        boxes = torch.tensor([r["bbox"] for r in found]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        instances = Instances((image["height"], image["width"]), pred_boxes=Boxes(boxes))
        instances.scores = torch.tensor([r["score"] for r in found])
        instances.pred_classes = torch.tensor(
            [index[r["category_id"]] for r in found], dtype=torch.int64
        )
        for field, key in (
            ("cls_scores", "cls_score"),
            ("pred_ious", "pred_iou"),
            ("pred_centernesses", "centerness"),
        ):
            if found and key in found[0]:
                instances.set(field, torch.tensor([r[key] for r in found]))
        yield [{"image_id": image["id"]}], [{"instances": instances}]


def run(evaluator, ground_truth, results):
    evaluator.reset()
    for inputs, outputs in predict(ground_truth, results):
        evaluator.process(inputs, outputs)
    return evaluator.evaluate()


@pytest.mark.parametrize("classes", [1, 4])
def test_equals_detectron2(register, tmp_path, classes):
    truth, results = make_random_coco(seed=classes, images=25, classes=classes)
    register("toy", truth)
    ours = run(COCOLocalizationEvaluator("toy", str(tmp_path / "ours")), truth, results)["bbox"]
    parent = COCOEvaluator("toy", output_dir=str(tmp_path / "theirs"), use_fast_impl=False)
    theirs = run(parent, truth, results)["bbox"]
    assert len(theirs) == (6 if classes == 1 else 10)
    assert ours["AP"] > 5
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(value, abs=1e-6), name
    assert list(ours)[:10] == [
        *["AP", "AP50", "AP60", "AP70", "AP75", "AP80", "AP90", "APs", "APm", "APl"]
    ]


def aware(results, seed=0):
    rng = np.random.default_rng(seed)
    keys = ("cls_score", "pred_iou", "centerness")
    return [{**r, **{key: rng.random() for key in keys}} for r in results]


@pytest.mark.parametrize("with_iou", [True, False])
def test_result_files_say_the_same(register, tmp_path, with_iou):
    truth, results = make_random_coco(seed=3, images=20, classes=3)
    gt_path = register("toy", truth)
    results = aware(results) if with_iou else results
    table = run(COCOLocalizationEvaluator("toy", str(tmp_path)), truth, results)["localization"]

    saved = json.loads((tmp_path / "coco_instances_results.json").read_text())
    by_score = {round(r["score"], 6): r for r in saved}
    assert len(by_score) == len(saved) == len(results)
    for result in results:
        written = by_score[round(float(np.float32(result["score"])), 6)]
        assert written.keys() == result.keys()
        assert written["category_id"] == result["category_id"]
        for key in result.keys() - {"image_id", "category_id"}:
            assert written[key] == pytest.approx(result[key], rel=1e-5, abs=1e-4), key

    records = read_records(gt_path, tmp_path / "coco_instances_results.json")
    assert localization_table(records) == table
    assert table["detections"] == (records.true_iou > 0.5).sum() > 20
    assert len(table) == (9 if with_iou else 5)
    if not with_iou:
        assert table["pearson_confidence"] == table["pearson_cls_score"]


def test_perfect_detector(register, tmp_path, caplog):
    """Each object is found once, by a box narrower than it; the confidence is its IoU."""
    truth, _ = make_random_coco(seed=4, images=20, classes=2)
    results = []
    for n, annotation in enumerate(truth["annotations"]):
        annotation.update(iscrowd=0, area=5000, bbox=[300.0 * (n % 7), 300.0 * (n // 7), 100, 50])
        x, y, w, h = annotation["bbox"]
        iou = 0.96 + 0.04 * n / len(truth["annotations"])
        results.append(
            {
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "bbox": [x, y, w * iou, h],
                "score": iou,
                "cls_score": 1 - iou,
                "pred_iou": iou**4,
            }
        )
    register("toy", truth)
    outcome = run(COCOLocalizationEvaluator("toy", str(tmp_path)), truth, results)
    for name, value in outcome["bbox"].items():
        undefined = name in ("APs", "APl")  # all objects are of medium size
        assert math.isnan(value) if undefined else value == pytest.approx(100), name
    table = outcome["localization"]
    assert table["pearson_confidence"] == pytest.approx(1, abs=1e-6)
    assert table["spearman_cls_score"] == pytest.approx(-1, abs=1e-6)
    assert table["spearman_pred_iou"] == pytest.approx(1, abs=1e-6)
    assert table["detections"] == len(results)

    with caplog.at_level("INFO"):
        print_csv_format(outcome)
    assert "pearson_confidence,spearman_confidence" in caplog.text


def test_nothing_found(register, tmp_path):
    truth, _ = make_random_coco(seed=5, images=5, classes=2)
    register("toy", truth)
    outcome = run(COCOLocalizationEvaluator("toy", str(tmp_path)), truth, [])
    assert "AP-class 1" in outcome["bbox"]
    assert all(math.isnan(value) for value in outcome["bbox"].values())
    assert outcome["localization"].pop("detections") == 0
    assert all(math.isnan(value) for value in outcome["localization"].values())
    assert json.loads((tmp_path / "coco_instances_results.json").read_text()) == []


@pytest.mark.parametrize("kind", ["no annotations", "crowds"])
def test_nothing_to_find(register, tmp_path, kind):
    truth, results = make_random_coco(seed=6, images=5, classes=1)
    if kind == "crowds":
        truth["annotations"] = [{**a, "iscrowd": 1} for a in truth["annotations"]]
    else:
        truth["annotations"] = []
    register("toy", truth)
    outcome = run(COCOLocalizationEvaluator("toy", str(tmp_path)), truth, results)
    assert all(math.isnan(value) for value in outcome["bbox"].values())
    assert outcome["localization"]["detections"] == 0


def test_a_test_set_without_annotations_is_only_saved(register, tmp_path):
    truth, results = make_random_coco(seed=7, images=5, classes=1)
    register("toy", truth)
    evaluator = COCOLocalizationEvaluator("toy", str(tmp_path))
    evaluator._do_evaluation = False  # what the parent finds in image_info_test-dev2017.json
    assert run(evaluator, truth, results) == {}
    saved = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert len(saved) == len(results)


def test_more_detections_than_100(register, tmp_path):
    boxes = [[10.0 * i, 0.0, 8.0, 8.0] for i in range(150)]
    image = {"id": 1, "height": 8, "width": 1500, "file_name": "1.jpg"}
    same = [{"image_id": 1, "category_id": 1, "bbox": box} for box in boxes]
    truth = {
        "images": [image],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [{**a, "id": i + 1, "area": 64, "iscrowd": 0} for i, a in enumerate(same)],
    }
    results = [{**r, "score": 1 - i / 1000} for i, r in enumerate(same)]
    register("toy", truth)
    for limit, expected in ((100, 100 * 67 / 101), (150, 100)):
        evaluator = COCOLocalizationEvaluator("toy", str(tmp_path), max_dets_per_image=limit)
        assert run(evaluator, truth, results)["bbox"]["AP50"] == pytest.approx(expected)


def test_a_class_the_dataset_lacks(register, tmp_path):
    truth, results = make_random_coco(seed=8, images=5, classes=2)
    register("toy", truth)
    evaluator = COCOLocalizationEvaluator("toy", str(tmp_path))
    evaluator.reset()
    for inputs, outputs in predict(truth, results):
        outputs[0]["instances"].pred_classes += 2
        evaluator.process(inputs, outputs)
    with pytest.raises(ValueError, match="'toy' has 2 classes"):
        evaluator.evaluate()


def test_detections_of_a_class_that_the_dataset_lacks_are_counted(register, tmp_path, monkeypatch):
    truth, results = make_random_coco(seed=8, images=5, classes=2)
    register("toy", truth)
    metadata, counts = MetadataCatalog.get("toy"), [r["category_id"] for r in results]
    kept, gone = (c["id"] for c in truth["categories"])
    del metadata.thing_dataset_id_to_contiguous_id
    metadata.thing_dataset_id_to_contiguous_id = {kept: 0}
    evaluator, said = COCOLocalizationEvaluator("toy", str(tmp_path)), []
    monkeypatch.setattr(evaluator._logger, "warning", said.append)
    run(evaluator, truth, results)
    saved = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert len(saved) == counts.count(kept) < len(results)
    name = metadata.thing_classes[1]
    assert said == [
        f"{counts.count(gone)} of {len(results)} detections are left out: they are of the classes "
        f"{name}, which toy lacks."
    ]


def test_without_annotations_detections_are_written_and_nothing_is_measured(register, tmp_path):
    truth, results = make_random_coco(seed=8, images=5, classes=2)
    register("toy", truth)
    register("toy", {key: value for key, value in truth.items() if key != "annotations"})
    measured = run(COCOLocalizationEvaluator("toy", str(tmp_path)), truth, results)
    print_csv_format(measured)
    assert measured == {} and verify_results(get_cfg(), measured)
    saved = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert len(saved) == len(results) > 0


def as_dicts(ground_truth):
    """The dataset in Detectron2's standard format, with image ids that are strings."""
    index = {c["id"]: k for k, c in enumerate(ground_truth["categories"])}
    return [
        {
            "file_name": image["file_name"],
            "image_id": f"im {image['id']}",
            "height": image["height"],
            "width": image["width"],
            "annotations": [
                {
                    "bbox": a["bbox"],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": index[a["category_id"]],
                    "iscrowd": a["iscrowd"],
                }
                for a in ground_truth["annotations"]
                if a["image_id"] == image["id"]
            ],
        }
        for image in ground_truth["images"]
    ]


def test_a_dataset_without_json_is_converted_anew(register, tmp_path):
    """The same name and folder, other data: an earlier run's file must not be believed."""
    name = "voc:/some/where:val"
    for seed in (9, 10):
        truth, results = make_random_coco(seed=seed, images=15, classes=2)
        for annotation in truth["annotations"]:
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        register("toy", truth)
        expected = run(COCOLocalizationEvaluator("toy", str(tmp_path / "a")), truth, results)

        dicts, classes = as_dicts(truth), [c["name"] for c in truth["categories"]]
        DatasetCatalog.register(name, lambda dicts=dicts: dicts)
        metadata = MetadataCatalog.get(name).set(thing_classes=classes)
        evaluator = COCOLocalizationEvaluator(name, str(tmp_path / "b"))
        assert not hasattr(metadata, "json_file")
        truth["images"] = [{**i, "id": f"im {i['id']}"} for i in truth["images"]]
        results = [{**r, "image_id": f"im {r['image_id']}"} for r in results]
        actual = run(evaluator, truth, results)
        forget(name)
        assert actual["bbox"]["AP"] == pytest.approx(expected["bbox"]["AP"], abs=0.01)
        assert actual["bbox"]["AP"] > 5
    files = {f"{file_stem(name)}_coco_format.json", "coco_instances_results.json"}
    assert files <= {path.name for path in (tmp_path / "b").iterdir()}


def test_a_dataset_without_objects_is_evaluated(tmp_path):
    truth, results = make_random_coco(seed=11, images=4, classes=1)
    dicts = [{**record, "annotations": []} for record in as_dicts(truth)]
    DatasetCatalog.register("bare", lambda: dicts)
    MetadataCatalog.get("bare").set(thing_classes=["class 0"])
    evaluator = COCOLocalizationEvaluator("bare", str(tmp_path))
    forget("bare")
    truth["images"] = [{**i, "id": f"im {i['id']}"} for i in truth["images"]]
    results = [{**r, "image_id": f"im {r['image_id']}"} for r in results]
    assert math.isnan(run(evaluator, truth, results)["bbox"]["AP50"])
