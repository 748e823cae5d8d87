"""Which evaluator a dataset gets, and the one of Pascal VOC."""

import json
import math
import xml.etree.ElementTree as ET

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_pascal_voc
from detectron2.evaluation import DatasetEvaluators
from detectron2.structures import Boxes, Instances

from iou_d2.evaluation import COCOLocalizationEvaluator, build_evaluator
from iou_d2.evaluation.build import VOCEvaluator, results_folder


@pytest.fixture
def cfg(tmp_path):
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    cfg.DATASETS.TEST = ("toy",)
    return cfg


@pytest.fixture
def toy(tmp_path):
    """A registered COCO dataset of one image."""
    path = tmp_path / "toy.json"
    path.write_text(
        json.dumps(
            {
                "images": [{"id": 1, "height": 9, "width": 9, "file_name": "1.jpg"}],
                "categories": [{"id": 1, "name": "a"}],
                "annotations": [],
            }
        )
    )
    yield MetadataCatalog.get("toy").set(json_file=str(path), evaluator_type="coco")
    MetadataCatalog.remove("toy")


@pytest.mark.parametrize(("detections", "counted"), [(50, 100), (100, 100), (300, 300)])
def test_coco(cfg, toy, detections, counted):
    cfg.TEST.DETECTIONS_PER_IMAGE = detections
    evaluator = build_evaluator(cfg, "toy")
    assert type(evaluator) is COCOLocalizationEvaluator
    assert evaluator._max_dets == counted


def test_results_of_several_datasets_do_not_meet(cfg, toy, tmp_path):
    image = [{"image_id": 1}]
    instances = Instances((9, 9), pred_boxes=Boxes(torch.zeros(0, 4)))
    instances.scores, instances.pred_classes = torch.zeros(0), torch.zeros(0, dtype=torch.int64)

    def result_files(**options):
        evaluator = build_evaluator(cfg, "toy", **options)
        evaluator.reset()
        evaluator.process(image, [{"instances": instances}])
        evaluator.evaluate()
        found = tmp_path.rglob("coco_instances_results.json")
        return {str(path.parent.relative_to(tmp_path)) for path in found}

    assert result_files() == {"output/inference"}
    assert result_files(output_dir=str(tmp_path / "mine")) == {"output/inference", "mine"}
    cfg.DATASETS.TEST = ("toy", "coco:/my/data.json")
    assert "output/inference/toy" in result_files()


@pytest.mark.parametrize("kind", ["lvis", None])
def test_other_kinds_are_refused(cfg, toy, kind):
    MetadataCatalog.remove("toy")
    MetadataCatalog.get("toy").set(**({"evaluator_type": kind} if kind else {}))
    with pytest.raises(ValueError, match=f"'toy' has the evaluator_type {kind!r}"):
        build_evaluator(cfg, "toy")


CLASSES = ["cat", "dog"]
OBJECTS = {  # image: [(class, difficult, 1-based inclusive box)]
    "000001": [("cat", 0, (11, 11, 50, 50)), ("dog", 0, (61, 1, 100, 40))],
    "000002": [("cat", 1, (1, 1, 40, 40))],
    "000003": [("dog", 0, (21, 21, 80, 60))],
}


@pytest.fixture
def voc_of(tmp_path):
    """Registers a VOC folder in the layout of the devkit, with some of the images."""

    def register(*images, year=2012):
        register_pascal_voc("toy_voc", str(written(tmp_path / "VOC", images)), "val", year, CLASSES)
        MetadataCatalog.get("toy_voc").evaluator_type = "pascal_voc"
        return "toy_voc"

    yield register
    DatasetCatalog.remove("toy_voc")
    MetadataCatalog.remove("toy_voc")


@pytest.fixture
def voc(voc_of):
    return voc_of(*OBJECTS)


def written(root, images):
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets" / "Main" / "val.txt").write_text("\n".join(images))
    for name in images:
        tree = ET.Element("annotation")
        size = ET.SubElement(tree, "size")
        ET.SubElement(size, "width").text = ET.SubElement(size, "height").text = "100"
        for kind, difficult, box in OBJECTS[name]:
            obj = ET.SubElement(tree, "object")
            fields = {"name": kind, "pose": "Left", "truncated": 0, "difficult": difficult}
            for field, value in fields.items():
                ET.SubElement(obj, field).text = str(value)
            bndbox = ET.SubElement(obj, "bndbox")
            for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box):
                ET.SubElement(bndbox, side).text = str(value)
        ET.ElementTree(tree).write(root / "Annotations" / f"{name}.xml")
    return root


def find(image, objects):
    """Model output: exact boxes with class index and confidence, for `(class, score, box)`."""
    instances = Instances((100, 100))
    boxes = [(x1 - 1, y1 - 1, x2, y2) for _, _, (x1, y1, x2, y2) in objects]
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.scores = torch.tensor([score for _, score, _ in objects])
    instances.pred_classes = torch.tensor([kind for kind, _, _ in objects], dtype=torch.int64)
    return [{"image_id": image}], [{"instances": instances}]


def test_voc_reports_both_tables(cfg, voc, tmp_path):
    """The cat is found; of two dogs one, behind a false one: AP = 1/2 * 1/2 of VOC 2012."""
    evaluator = build_evaluator(cfg, voc)
    assert isinstance(evaluator, DatasetEvaluators)
    evaluator.reset()
    evaluator.process(*find("000001", [(0, 0.9, (11, 11, 50, 50)), (1, 0.8, (1, 61, 40, 100))]))
    evaluator.process(*find("000002", []))
    evaluator.process(*find("000003", [(1, 0.7, (21, 21, 80, 60))]))
    results = evaluator.evaluate()
    assert list(results) == ["bbox", "localization", "voc"]
    assert results["voc"]["AP50"] == pytest.approx((100 + 25) / 2)
    # The COCO way interpolates at 101 recalls and knows no difficult objects: 51 of 101 levels are
    # up to 1/2, at precision 1 for the cats and 1/2 for the dogs.
    assert results["bbox"]["AP-cat"] == pytest.approx(100 * 51 / 101)
    assert results["bbox"]["AP-dog"] == pytest.approx(100 * 51 / 101 / 2)
    assert results["localization"]["detections"] == 2
    with open(tmp_path / "output" / "inference" / "toy_voc_coco_format.json") as f:
        assert len(json.load(f)["annotations"]) == 4


def test_voc_on_another_process_reports_nothing(cfg, voc, monkeypatch):
    evaluator = build_evaluator(cfg, voc)._evaluators[1]
    evaluator.reset()
    parent = type(evaluator).__mro__[1]
    monkeypatch.setattr(parent, "evaluate", lambda self: None)
    assert evaluator.evaluate() is None


def test_voc_counts_the_classes_that_have_objects(cfg, voc):
    """A model that knows a cow, and sees one, on a set without cows."""
    metadata = MetadataCatalog.get(voc)
    del metadata.thing_classes
    metadata.thing_classes = ["cow", "cat", "dog"]
    records = DatasetCatalog.get(voc)
    for record in records:
        for annotation in record["annotations"]:
            annotation["category_id"] += 1
    DatasetCatalog.remove(voc)
    DatasetCatalog.register(voc, lambda: records)
    evaluator = build_evaluator(cfg, voc)
    evaluator.reset()
    evaluator.process(*find("000001", [(1, 0.9, (11, 11, 50, 50)), (2, 0.8, (1, 61, 40, 100))]))
    evaluator.process(*find("000002", [(0, 0.9, (1, 1, 90, 90))]))
    evaluator.process(*find("000003", [(2, 0.7, (21, 21, 80, 60))]))
    results = evaluator.evaluate()
    assert results["voc"]["AP50"] == pytest.approx((100 + 25) / 2)
    assert results["bbox"]["AP-dog"] == pytest.approx(100 * 51 / 101 / 2)
    mean = (results["bbox"]["AP-cat"] + results["bbox"]["AP-dog"]) / 2
    assert results["bbox"]["AP"] == pytest.approx(mean)


@pytest.mark.parametrize("year", [2007, 2012])
@pytest.mark.parametrize("sees_the_cat", [True, False])
def test_voc_leaves_out_a_class_whose_objects_are_all_difficult(voc_of, year, sees_the_cat):
    evaluator = VOCEvaluator(voc_of("000002", "000003", year=year))
    evaluator.reset()
    evaluator.process(*find("000002", [(0, 0.9, (1, 1, 40, 40))] if sees_the_cat else []))
    evaluator.process(*find("000003", [(1, 0.7, (21, 21, 80, 60))]))
    results = evaluator.evaluate()
    assert results["voc"] == pytest.approx({"AP": 100, "AP50": 100, "AP75": 100})


@pytest.mark.parametrize("images", [(), ("000002",)])
def test_voc_without_objects_that_count_has_no_ap(voc_of, images):
    evaluator = VOCEvaluator(voc_of(*images))
    evaluator.reset()
    for image in images:
        evaluator.process(*find(image, [(1, 0.9, (11, 11, 50, 50))]))
    results = evaluator.evaluate()
    assert all(math.isnan(results["voc"][metric]) for metric in ("AP", "AP50", "AP75"))


def test_several_datasets_have_folders_of_their_own(cfg):
    assert results_folder(cfg, "toy") == f"{cfg.OUTPUT_DIR}/inference"
    cfg.DATASETS.TEST = ("toy", "other")
    assert results_folder(cfg, "other", "inference_TTA") == f"{cfg.OUTPUT_DIR}/inference_TTA/other"
