"""Two gloo processes that see half of the images each report what one process reports."""

import json

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances

from iou_d2.evaluation import COCOLocalizationEvaluator
from processes import spawn_cpu
from random_coco import make_random_coco


def evaluate(folder, rank, processes):
    """Evaluate every `processes`-th image from `rank` on; the results, {} where none are due."""
    with open(f"{folder}/gt.json") as f:
        images = json.load(f)["images"]
    with open(f"{folder}/results.json") as f:
        results = json.load(f)
    MetadataCatalog.get("toy").set(
        json_file=f"{folder}/gt.json", thing_dataset_id_to_contiguous_id={1: 0, 3: 1}
    )
    evaluator = COCOLocalizationEvaluator("toy", f"{folder}/{processes}")
    evaluator.reset()
    for image in images[rank::processes]:
        found = [r for r in results if r["image_id"] == image["id"]]
        instances = Instances((500, 500))
        boxes = torch.tensor([r["bbox"] for r in found]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        instances.pred_boxes = Boxes(boxes)
        instances.scores = torch.tensor([r["score"] for r in found])
        instances.pred_classes = torch.tensor(
            [(r["category_id"] - 1) // 2 for r in found], dtype=torch.int64
        )
        evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])
    outcome = evaluator.evaluate()
    MetadataCatalog.remove("toy")
    return outcome


def evaluate_part(rank, folder):
    with open(f"{folder}/{rank}.json", "w") as f:
        json.dump(evaluate(folder, rank, processes=2), f)


def test_two_processes(tmp_path):
    truth, results = make_random_coco(seed=1, images=15, classes=2)
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    (tmp_path / "results.json").write_text(json.dumps(results))
    spawn_cpu(evaluate_part, 2, str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert second == {}
    for task, expected in evaluate(tmp_path, rank=0, processes=1).items():
        assert first[task] == pytest.approx(expected, nan_ok=True)
    assert first["bbox"]["AP"] > 5 and first["localization"]["detections"] > 10
