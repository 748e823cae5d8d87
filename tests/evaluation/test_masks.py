"""AP of masks against pycocotools as its authors call it, and against Detectron2's evaluator."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from iou_d2.analysis.average_precision import coco_precision, summarize_ap
from iou_d2.evaluation import COCOLocalizationEvaluator

HEIGHT, WIDTH = 90, 120
BACKENDS = ("pycocotools", "faster")


def ellipse(rng) -> np.ndarray:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    height, width = rng.uniform(4, 40, 2)
    v, u = rng.uniform(15, HEIGHT - 15), rng.uniform(15, WIDTH - 15)
    return ((y - v) / height) ** 2 + ((x - u) / width) ** 2 <= 1


def box_of(mask: np.ndarray) -> list[float]:
    return mask_util.toBbox(mask_util.encode(np.asfortranarray(mask, np.uint8))).tolist()


def rle_of(mask: np.ndarray, compressed: bool) -> dict:
    if compressed:
        rle = mask_util.encode(np.asfortranarray(mask, np.uint8))
        return {"size": rle["size"], "counts": rle["counts"].decode()}
    flat = np.concatenate([[False], mask.ravel(order="F"), [False]])
    ends = np.flatnonzero(flat[1:] != flat[:-1]).tolist()
    counts = np.diff([0, *ends, mask.size]).tolist()
    counts = counts[:-1] if counts[-1] == 0 else counts
    return {"size": list(mask.shape), "counts": counts}


def scene(seed: int = 0, images: int = 8):
    """Objects with polygons, RLE of both kinds and crowds; the pixels that a detector finds."""
    rng = np.random.default_rng(seed)
    truth = {
        "info": {},
        "images": [
            {"id": n, "file_name": f"{n}.png", "height": HEIGHT, "width": WIDTH}
            for n in range(1, images + 1)
        ],
        "categories": [{"id": 3, "name": "cell"}, {"id": 5, "name": "hole"}],
        "annotations": [],
    }
    found = []
    for image in truth["images"][:-1]:  # the last one has no objects
        for place in range(4):
            mask, category = ellipse(rng), (3, 5)[rng.integers(2)]
            if place == 0:
                corners = np.round(rng.uniform(10, 80, 8), 1)
                segmentation = [corners.tolist(), [1.0, 2.0]]  # the second is a point, no area
                rle = mask_util.frPyObjects(segmentation[:1], HEIGHT, WIDTH)
                mask = mask_util.decode(mask_util.merge(rle)).astype(bool)
            else:
                segmentation = rle_of(mask, compressed=place > 1)
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": image["id"],
                    "category_id": category,
                    "bbox": box_of(mask),
                    "area": float(mask.sum()),
                    "iscrowd": int(place == 3),
                    "segmentation": segmentation,
                }
            )
            moved = np.roll(mask, rng.integers(-3, 4, 2), axis=(0, 1))
            for guess in (moved, ellipse(rng)):
                found.append((image["id"], category, guess, float(rng.random())))
    return truth, found


def results_of(found) -> list[dict]:
    return [
        {
            "image_id": image,
            "category_id": category,
            "bbox": box_of(mask),
            "score": score,
            "segmentation": rle_of(mask, compressed=True),
        }
        for image, category, mask, score in found
    ]


def by_pycocotools(path, results) -> np.ndarray:
    truth = COCO(str(path))
    without_boxes = copy.deepcopy(results)  # so that `loadRes` takes areas from masks
    for result in without_boxes:
        del result["bbox"]
    evaluation = COCOeval(truth, truth.loadRes(without_boxes), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval["precision"][..., 2]


@pytest.fixture
def dataset(tmp_path):
    """A function: truth -> its registered name and its file."""

    def register(truth):
        path = tmp_path / "truth.json"
        path.write_text(json.dumps(truth))
        register_coco_instances("masks", {}, str(path), str(tmp_path))
        DatasetCatalog.get("masks")
        return "masks", path

    yield register
    if "masks" in DatasetCatalog:
        DatasetCatalog.remove("masks")
        MetadataCatalog.remove("masks")


def plain_polygons(truth):
    """Without what pycocotools itself misreads."""
    truth = copy.deepcopy(truth)
    for annotation in truth["annotations"]:
        if isinstance(annotation["segmentation"], list):
            annotation["segmentation"] = annotation["segmentation"][:1]
    return truth


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_count_as_pycocotools_counts_them(tmp_path, backend):
    truth, found = scene()
    results = results_of(found)
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(plain_polygons(truth)))
    before = copy.deepcopy((truth, results))
    precision = coco_precision(truth, results, backend=backend, kind="segm")
    np.testing.assert_allclose(precision, by_pycocotools(path, results), atol=1e-6)
    assert (truth, results) == before
    boxes = summarize_ap(coco_precision(truth, results, backend=backend), [])
    masks = summarize_ap(precision, [])
    assert 5 < masks["AP"] < 95 and abs(masks["AP"] - boxes["AP"]) > 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_area_of_a_detection_is_that_of_its_mask(backend):
    truth, found = scene()
    results = results_of(found)
    expected = coco_precision(truth, results, backend=backend, kind="segm")
    given = [{**result, "area": 3} for result in results]
    actual = coco_precision(truth, given, backend=backend, kind="segm")
    np.testing.assert_array_equal(actual, expected)


def test_a_missing_mask_is_told():
    truth, found = scene()
    truth["annotations"][3]["segmentation"] = [[1.0, 2.0, 3.0, 4.0]]
    with pytest.raises(ValueError, match="has no mask"):
        coco_precision(truth, results_of(found), kind="segm")


def run(evaluator, truth, found, with_masks=True):
    index = {category["id"]: k for k, category in enumerate(truth["categories"])}
    evaluator.reset()
    for image in truth["images"]:
        here = [x for x in found if x[0] == image["id"]]
        instances = Instances((HEIGHT, WIDTH))
        boxes = torch.tensor([box_of(x[2]) for x in here]).view(-1, 4).float()
        boxes[:, 2:] += boxes[:, :2]
        instances.pred_boxes = Boxes(boxes)
        instances.scores = torch.tensor([x[3] for x in here])
        instances.pred_classes = torch.tensor([index[x[1]] for x in here], dtype=torch.int64)
        if with_masks:
            masks = [torch.from_numpy(x[2]) for x in here]
            empty = torch.zeros(0, HEIGHT, WIDTH, dtype=torch.bool)
            instances.pred_masks = torch.stack(masks) if masks else empty
        evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])
    return evaluator.evaluate()


def test_the_task_segm_is_that_of_detectron2(dataset, tmp_path):
    truth, found = scene(1)
    truth = plain_polygons(truth)
    name, _ = dataset(truth)
    ours = run(COCOLocalizationEvaluator(name, str(tmp_path / "ours")), truth, found)
    theirs = COCOEvaluator(name, output_dir=str(tmp_path / "theirs"), use_fast_impl=False)
    theirs = run(theirs, truth, found)
    assert list(ours) == ["bbox", "segm", "localization"] and theirs["segm"]["AP"] > 5
    for task in ("bbox", "segm"):
        for metric, value in theirs[task].items():
            assert ours[task][metric] == pytest.approx(value, abs=1e-5, nan_ok=True), (task, metric)
    assert ours["segm"]["AP60"] >= ours["segm"]["AP90"]


def test_there_is_no_task_segm_without_masks(dataset, tmp_path):
    truth, found = scene(2)
    name, _ = dataset(truth)
    evaluator = COCOLocalizationEvaluator(name, str(tmp_path))
    assert list(run(evaluator, truth, found, with_masks=False)) == ["bbox", "localization"]


def test_masks_of_some_objects_are_not_measured(dataset, tmp_path, monkeypatch):
    truth, found = scene(2)
    name, _ = dataset(truth)
    evaluator, said = COCOLocalizationEvaluator(name, str(tmp_path)), []
    monkeypatch.setattr(evaluator._logger, "warning", said.append)
    truth = copy.deepcopy(truth)
    for annotation in evaluator._coco_api.dataset["annotations"][:2]:
        annotation["segmentation"] = []
    assert list(run(evaluator, truth, found)) == ["bbox", "localization"]
    assert said == ["Masks are not measured: 2 of the 28 objects of masks have none."]


def test_nothing_found_or_nothing_to_find(dataset, tmp_path):
    truth, found = scene(3)
    name, _ = dataset(truth)
    evaluator = COCOLocalizationEvaluator(name, str(tmp_path))
    nothing = run(evaluator, truth, [])
    assert np.isnan(nothing["segm"]["AP"]) and nothing["segm"].keys() == nothing["bbox"].keys()
    evaluator._coco_api.dataset["annotations"] = []
    assert np.isnan(run(evaluator, truth, found)["segm"]["AP"])
