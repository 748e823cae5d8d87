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

from .coco import COCOLocalizationEvaluator, file_stem


class VOCEvaluator(PascalVOCDetectionEvaluator):
    """Detectron2's Pascal VOC evaluator, reported as the task "voc" to stand beside "bbox".

    AP, AP50 and AP75 in percent, objects marked difficult left out. Detectron2 lets a class without
    objects count as 0 or NaN in these means; the COCO-style AP leaves it out.
    """

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """{"voc": {metric: value}} on the main process, None on the others."""
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
        output_dir: folder for the result files; None for "inference" in cfg.OUTPUT_DIR, and there
            for a folder of its own if several datasets are evaluated.

    Returns:
        "coco": tasks "bbox" and "localization". "pascal_voc": these, and "voc".

    Raises:
        ValueError: the dataset is evaluated in another way.
    """
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if evaluator_type not in ("coco", "pascal_voc"):
        raise ValueError(
            f"The dataset {dataset_name!r} has the evaluator_type {evaluator_type!r}, but only "
            f'"coco" and "pascal_voc" are supported.'
        )
    if output_dir is None:
        output_dir = os.path.join(cfg.OUTPUT_DIR, "inference")
        if len(cfg.DATASETS.TEST) > 1:
            output_dir = os.path.join(output_dir, file_stem(dataset_name))
    coco = COCOLocalizationEvaluator(
        dataset_name, output_dir, max_dets_per_image=max(100, cfg.TEST.DETECTIONS_PER_IMAGE)
    )
    if evaluator_type == "coco":
        return coco
    return DatasetEvaluators([coco, VOCEvaluator(dataset_name)])
