"""Which evaluator a dataset gets."""

from __future__ import annotations

import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    DatasetEvaluator,
    DatasetEvaluators,
    PascalVOCDetectionEvaluator,
)
from detectron2.evaluation.pascal_voc_evaluation import parse_rec
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from iou_d2.errors import InputError

from .coco import COCOLocalizationEvaluator, file_stem


class VOCEvaluator(PascalVOCDetectionEvaluator):
    """Detectron2's Pascal VOC evaluator, reported as the task "voc" to stand beside "bbox".

    AP, AP50 and AP75 in percent over the classes that have objects, those marked difficult left
    out; NaN where no class has. Detectron2 counts a class without objects as 0 or NaN.
    """

    def __init__(self, dataset_name: str):
        super().__init__(dataset_name)
        present = self._names_of_objects()
        indices = [index for index, name in enumerate(self._class_names) if name in present]
        # Class index of the model -> the number that the parent gives to a class that is there.
        self._number = {index: number for number, index in enumerate(indices)}
        self._class_names = [self._class_names[index] for index in indices]

    def _names_of_objects(self) -> set[str]:
        """Classes of the objects that count. Records do not say which are difficult, so that these
        are read from the files that the parent reads too, which keeps them in memory."""
        with PathManager.open(self._image_set_path) as file:
            files = [self._anno_file_template.format(line.strip()) for line in file]
        objects = [found for file in files for found in parse_rec(file)]
        return {found["name"] for found in objects if not found["difficult"]}

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """{"voc": {metric: value}} on the main process, None on the others."""
        self._predictions = {
            self._number[index]: lines
            for index, lines in self._predictions.items()
            if index in self._number
        }
        if not self._class_names:
            undefined = dict.fromkeys(("AP", "AP50", "AP75"), float("nan"))
            return {"voc": undefined} if comm.is_main_process() else None
        results = super().evaluate()
        if not results:
            return None
        return {"voc": {metric: float(value) for metric, value in results["bbox"].items()}}


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_dir: str | None = None
) -> DatasetEvaluator:
    """The evaluator of a registered dataset, by "evaluator_type" in its metadata.

    Args:
        cfg: reads OUTPUT_DIR, DATASETS.TEST and TEST.DETECTIONS_PER_IMAGE; where the last is over
            100, the limit of COCO, AP counts as many detections.
        dataset_name: a registered dataset.
        output_dir: folder for the result files; None for `results_folder`.

    Returns:
        "coco": tasks "bbox" and "localization", and of masks "segm". "pascal_voc": these, and
        "voc". Of a ProposalNetwork the task "box_proposals".

    Raises:
        InputError: the dataset is evaluated in another way.
    """
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if evaluator_type not in ("coco", "pascal_voc"):
        raise InputError(
            f"The dataset {dataset_name!r} has the evaluator_type {evaluator_type!r}, but only "
            f'"coco" and "pascal_voc" are supported.'
        )
    if output_dir is None:
        output_dir = results_folder(cfg, dataset_name)
    coco = COCOLocalizationEvaluator(
        dataset_name, output_dir, max_dets_per_image=max(100, cfg.TEST.DETECTIONS_PER_IMAGE)
    )
    if evaluator_type == "coco" or cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
        return coco
    return DatasetEvaluators([coco, VOCEvaluator(dataset_name)])


def results_folder(cfg: CfgNode, dataset_name: str, name: str = "inference") -> str:
    """The folder `name` in cfg.OUTPUT_DIR, and in it one for each of several datasets."""
    folder = os.path.join(cfg.OUTPUT_DIR, name)
    return os.path.join(folder, file_stem(dataset_name)) if len(cfg.DATASETS.TEST) > 1 else folder
