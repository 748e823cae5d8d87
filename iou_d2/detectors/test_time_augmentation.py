"""Test-time augmentation of every detector: an image is looked at several times, resized and
mirrored, and what is found is merged before NMS.

Detectron2's own, GeneralizedRCNNWithTTA, merges R-CNNs alone, after the NMS of each view.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from iou_d2.errors import InputError
from iou_d2.ops.box_voting import vote_boxes

from .dense import first, part_named, rescale_detections
from .unitbox import UnitBox
from .unitbox_inference import EllipseFit
from .view_readers import Reader, Reading, reader_of
from .views import View, ViewMaker, build_view_maker, original_image

Suppress = Callable[[Sequence[Instances]], Instances]
# (what all views found, the view in whose pixels to put it, the NMS of the method) -> detections.
Merge = Callable[[Sequence[Reading], View, Suppress], Instances]


def merge_by_nms(readings: Sequence[Reading], view: View, suppress: Suppress) -> Instances:
    """The candidates of all views go together through the NMS of the method."""
    found = [x.view.within_sizes(y) for x in readings for y in _candidates_in(view, x)]
    return suppress(found)


@dataclass(frozen=True)
class MergeByVoting:
    """Each view has its own NMS; what it leaves is merged by `vote_boxes`, as RefineDet's authors
    test at several sizes.

    Args:
        threshold, min_soft_score: see `vote_boxes`.
        max_detections: of an image; negative for all.
        class_agnostic: boxes of all classes vote together, as one NMS suppresses them.
    """

    threshold: float
    max_detections: int
    min_soft_score: float | None = None
    class_agnostic: bool = False

    def __call__(self, readings: Sequence[Reading], view: View, suppress: Suppress) -> Instances:
        by_view = [x.view.within_sizes(suppress(_candidates_in(view, x))) for x in readings]
        found = Instances.cat(by_view)
        classes = found.pred_classes
        index, boxes, scores = vote_boxes(
            found.pred_boxes.tensor,
            found.scores,
            torch.zeros_like(classes) if self.class_agnostic else classes,
            self.threshold,
            self.min_soft_score,
        )
        detections = found[index]
        detections.pred_boxes, detections.scores = Boxes(boxes), scores
        return first(detections, self.max_detections)


def _candidates_in(view: View, reading: Reading) -> list[Instances]:
    return [reading.view.instances_in(view, x) for x in reading.candidates]


class DetectorWithTTA(nn.Module):
    """A detector that looks at several views of each image, in test mode only.

    With a single view of the size of plain inference it gives what the detector gives an image
    alone, to the last bit. What is found is merged in pixels of the view of that size, or of the
    one nearest to it, since there a refinement reads features of the size that was trained.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        reader: Reader,
        make_views: ViewMaker,
        merge: Merge,
        input_format: str,
    ):
        """
        Args:
            model, reader: a detector, and what reads it.
            make_views: the views of an image.
            merge: from what they found to detections.
            input_format: of the channels that the detector takes, "BGR" or "RGB".
        """
        super().__init__()
        self.model = model
        self.reader = reader
        self.make_views = make_views
        self.merge = merge
        self.input_format = input_format
        self.train(model.training)

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """Detectron2's standard input -> one {"instances": Instances} an image, as the detector's.

        Views are made of the image at its own size (`original_image`), and detections are in
        pixels of "height" and "width" or, without these, of that size.
        """
        if self.training:
            raise RuntimeError("Test-time augmentation is for detectors in test mode: call eval().")
        return [self._detect(x) for x in batched_inputs]

    @torch.no_grad()
    def _detect(self, dataset_dict: dict) -> dict:
        image = original_image(dataset_dict, self.input_format)
        views, chosen = self.make_views(image)
        readings = [self.reader.read(view, view is chosen) for view in views]
        (own,) = (x for x in readings if x.view is chosen)
        detections = self.merge(readings, chosen, self.reader.suppress)
        detections = self.reader.finish(detections, own, readings)
        height, width = image.shape[-2:]
        (output,) = rescale_detections(
            [detections], [{"height": height, "width": width, **dataset_dict}]
        )
        return output


def build_merge(cfg) -> Merge:
    """What TEST.AUG.MERGE names."""
    node, limit = cfg.TEST.AUG, cfg.TEST.DETECTIONS_PER_IMAGE
    if not 0 <= node.VOTE_THRESH <= 1:
        raise InputError(f"TEST.AUG.VOTE_THRESH lies in [0, 1], but it is {node.VOTE_THRESH}.")
    is_point_detector = cfg.MODEL.META_ARCHITECTURE == "PointDetector"
    agnostic = is_point_detector and cfg.MODEL.POINT_DETECTOR.CLASS_AGNOSTIC_NMS
    vote = functools.partial(MergeByVoting, node.VOTE_THRESH, limit, class_agnostic=agnostic)
    parts = {
        "nms": merge_by_nms,
        "vote": vote(),
        "soft_vote": vote(min_soft_score=node.SOFT_VOTE_MIN_SCORE),
    }
    return part_named(parts, node.MERGE, "TEST.AUG.MERGE")


def with_tta(cfg, model: nn.Module) -> DetectorWithTTA:
    """`model`, which is built of `cfg`, with the augmentation that TEST.AUG describes.

    Raises InputError: a key has a wrong value, or the views of such a model cannot be merged.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    merge = build_merge(cfg)
    fits_ellipses = isinstance(model, UnitBox) and isinstance(model.extract, EllipseFit)
    if fits_ellipses and merge is merge_by_nms:
        raise InputError(
            "TEST.AUG.ENABLED is True, but MODEL.UNITBOX.INFERENCE 'ellipses' has no NMS that "
            "could merge the views: set it to 'nms', or TEST.AUG.MERGE to 'vote'."
        )
    return DetectorWithTTA(
        model=model,
        reader=reader_of(model),
        make_views=build_view_maker(cfg),
        merge=merge,
        input_format=cfg.INPUT.FORMAT,
    )
