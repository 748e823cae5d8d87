"""COCO evaluation of boxes and masks, and of how well a detector's scores rank its boxes.

`Instances` of a detector have `pred_boxes`, `scores` (the confidence that ranks), `pred_classes`
and, where the method has them, `cls_scores` (class score), `pred_ious` (predicted IoU) and
`pred_centernesses`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re

from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table
from tabulate import tabulate

from iou_d2.analysis.average_precision import coco_precision, has_mask, summarize_ap
from iou_d2.analysis.curves import localization_table
from iou_d2.analysis.records import make_records
from iou_d2.errors import InputError
from iou_d2.field_names import OPTIONAL_FIELDS


class COCOLocalizationEvaluator(COCOEvaluator):
    """Detectron2's COCO evaluator for boxes and masks, with the tables of the localisation papers.

    Tasks are reported (on the main process; gathering is the parent's):

    - "bbox": AP, AP50, AP60, AP70, AP75, AP80, AP90, APs, APm, APl, AP-<class>, in percent.
    - "segm": the same of the masks, where the detector gives `pred_masks` and each object has a
      mask, polygons or RLE.
    - "localization": Pearson's and Spearman's correlation of the confidence, the class score and
      the predicted IoU with the true IoU: see `iou_d2.analysis.localization_table`.

    All count the classes that are in the dataset and that the model knows.

    NaN stands for what is not defined: AP without objects, a correlation over fewer than two
    detections and, as in Detectron2, every AP of a model without any detection.

    `output_dir` receives "coco_instances_results.json", whose entries also hold "cls_score",
    "pred_iou" and "centerness" where the detector gives them. A dataset without a JSON of its own
    (Pascal VOC) is converted on each construction into "<dataset>_coco_format.json" there, never
    taken from an earlier run, so that the numbers are those of the dataset as it is now.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str,
        *,
        distributed: bool = True,
        max_dets_per_image: int = 100,
        backend: str | None = None,
    ):
        """
        Args:
            dataset_name: a registered dataset, with "json_file" in its metadata or in Detectron2's
                standard format.
            output_dir: folder for the result files; made if needed.
            distributed: gather the predictions of all processes.
            max_dets_per_image: detections of an image and class that count, best first.
            backend: what counts, see `coco_precision`.
        """
        metadata = MetadataCatalog.get(dataset_name)
        convert = not hasattr(metadata, "json_file")
        if convert:
            metadata.json_file = _write_coco_json(dataset_name, output_dir)
        try:
            super().__init__(
                dataset_name,
                tasks=("bbox",),
                distributed=distributed,
                output_dir=output_dir,
                use_fast_impl=False,
            )
        finally:
            if convert:
                del metadata.json_file
        self._max_dets = max_dets_per_image
        self._backend = backend

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Keep the "instances" of `outputs` as COCO detections, moved to the CPU; of a
        ProposalNetwork its "proposals", for which Detectron2 writes box_proposals.pkl and gives the
        task "box_proposals", average recalls."""
        for image, output in zip(inputs, outputs):
            if "proposals" in output:
                proposals = output["proposals"].to(self._cpu_device)
                prediction = {"image_id": image["image_id"], "proposals": proposals}
                self._predictions.append(prediction)
                continue
            instances = output["instances"].to(self._cpu_device)
            prediction = {
                "image_id": image["image_id"],
                "instances": instances_to_results(instances, image["image_id"]),
                "has_masks": instances.has("pred_masks"),
            }
            self._predictions.append(prediction)

    # The parent's `evaluate` calls these on the main process with the predictions of all of them.
    def _eval_box_proposals(self, predictions: list[dict]) -> None:
        super()._eval_box_proposals(predictions)
        path = os.path.join(self._output_dir, "box_proposals.pkl")
        self._logger.info(f"Saved the proposals of {len(predictions)} images to {path}")

    def _eval_predictions(self, predictions: list[dict], img_ids: list | None = None) -> None:
        results = list(itertools.chain.from_iterable(p["instances"] for p in predictions))
        results = self.with_category_ids(results)
        path = os.path.join(self._output_dir, "coco_instances_results.json")
        with PathManager.open(path, "w") as f:
            f.write(json.dumps(results))
        self._logger.info(f"Saved {len(results)} detections to {path}")
        if not self._do_evaluation:
            self._logger.info("Annotations are not available for evaluation.")
            return

        truth = self.truth()
        self._results["bbox"] = self._average_precision(truth, results, img_ids, "bbox")
        if any(p["has_masks"] for p in predictions) and self._can_measure_masks(truth):
            self._results["segm"] = self._average_precision(truth, results, img_ids, "segm")
        records = make_records(truth, results)
        self._results["localization"] = localization_table(records)
        table = create_small_table(self._results["localization"])
        self._logger.info(f"Correlation with the true IoU, where it is over 0.5:\n{table}")

    def _category_of(self) -> dict[int, int]:
        """The category id of each class index that the dataset has."""
        mapping = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if mapping is None:
            return {id_: id_ for id_ in self._coco_api.cats}
        return {index: id_ for id_, index in mapping.items()}

    def truth(self) -> dict:
        """The COCO dataset of the objects that count, those of classes that the model knows.

        Raises a KeyError where the dataset has no annotations."""
        return restrict_classes(self._coco_api.dataset, set(self._category_of().values()))

    def with_category_ids(self, results: list[dict]) -> list[dict]:
        """Detections by class index, changed in place, without those of classes that the model has
        and the dataset lacks."""
        category_of = self._category_of()
        classes = self._metadata.get("thing_classes") or category_of
        for result in results:
            if not 0 <= result["category_id"] < max(len(classes), len(category_of)):
                raise InputError(
                    f"A detection has class {result['category_id']}, but the dataset "
                    f"{self._metadata.name!r} has {len(classes)} classes: does the model belong to "
                    "this dataset?"
                )
        kept = [result for result in results if result["category_id"] in category_of]
        if len(kept) < len(results):
            lacking = [c for index, c in enumerate(classes) if index not in category_of]
            self._logger.warning(
                f"{len(results) - len(kept)} of {len(results)} detections are left out: they are "
                f"of the classes {', '.join(map(str, lacking))}, which {self._metadata.name} lacks."
            )
        for result in kept:
            result["category_id"] = category_of[result["category_id"]]
        return kept

    def _can_measure_masks(self, truth: dict) -> bool:
        """Whether each object has a mask; logs how many have none where some have one."""
        objects = truth["annotations"]
        without = sum(not has_mask(x.get("segmentation")) for x in objects)
        if 0 < without < len(objects):
            self._logger.warning(
                f"Masks are not measured: {without} of the {len(objects)} objects of "
                f"{self._metadata.name} have none."
            )
        return not without

    def _average_precision(
        self, truth: dict, results: list[dict], img_ids: list | None, task: str
    ) -> dict[str, float]:
        precision = coco_precision(
            truth,
            results,
            image_ids=img_ids,
            max_dets=self._max_dets,
            backend=self._backend,
            kind=task,
        )
        categories = sorted(truth["categories"], key=lambda category: category["id"])
        names = [category["name"] for category in categories]
        table = summarize_ap(precision, names)
        if not results:
            self._logger.warning("No predictions from the model!")
            return dict.fromkeys(table, float("nan"))

        overall = {key: value for key, value in table.items() if "-" not in key}
        self._logger.info(f"Evaluation results for {task}:\n{create_small_table(overall)}")
        by_class = [(name, table[f"AP-{name}"]) for name in names]
        self._logger.info(
            f"AP of {task} by class:\n" + tabulate(by_class, ["category", "AP"], "pipe")
        )
        return table


def restrict_classes(truth: dict, category_ids: set) -> dict:
    """A COCO dataset without the categories, and their objects, that are not in `category_ids`."""
    if {category["id"] for category in truth["categories"]} <= category_ids:
        return truth
    return {
        **truth,
        "categories": [c for c in truth["categories"] if c["id"] in category_ids],
        "annotations": [a for a in truth["annotations"] if a["category_id"] in category_ids],
    }


def restrict_to_known(truth: dict, dataset_name: str) -> dict:
    """`truth` of a registered dataset without the classes that its model does not know."""
    mapping = MetadataCatalog.get(dataset_name).get("thing_dataset_id_to_contiguous_id")
    return truth if mapping is None else restrict_classes(truth, set(mapping))


def file_stem(dataset_name: str) -> str:
    """The name as a file may have it: names of a user's own data hold paths. No two are alike."""
    plain = re.sub(r"[^\w.-]+", "_", dataset_name, flags=re.ASCII)
    if plain == dataset_name and len(plain) <= 100:
        return plain
    return f"{plain[-80:].lstrip('_.')}-{hashlib.sha256(dataset_name.encode()).hexdigest()[:8]}"


def instances_to_results(instances: Instances, image_id: int | str) -> list[dict]:
    """COCO detections of one image, on the CPU, with the values of OPTIONAL_FIELDS if there."""
    results = instances_to_coco_json(instances, image_id)
    for field, key in OPTIONAL_FIELDS.items():
        if instances.has(field):
            for result, value in zip(results, instances.get(field).tolist()):
                result[key] = value
    return results


def _write_coco_json(dataset_name: str, output_dir: str) -> str:
    """Write a dataset of the catalog as COCO JSON into `output_dir`; returns the path."""
    dataset = convert_to_coco_dict(dataset_name)
    dataset.setdefault("annotations", [])  # left out by Detectron2 where there are no objects
    PathManager.mkdirs(output_dir)
    path = os.path.join(output_dir, f"{file_stem(dataset_name)}_coco_format.json")
    # Every process writes the same content; none may read a half-written file of another.
    partial = f"{path}.{os.getpid()}"
    with open(partial, "w") as f:
        f.write(json.dumps(dataset))
    os.replace(partial, path)
    return path
