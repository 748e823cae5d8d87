"""What detectors say of an image before NMS, and where refinement moves their boxes.

Shape letters: R candidates of an image, S detections, T steps. Boxes are XYXY in pixels of the
network input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

from detectron2.config import CfgNode
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from iou_d2.detectors.dense import DenseDetector
from iou_d2.detectors.iou_net_inference import (
    GradientAscent,
    IteratedRegression,
    build_postprocessor,
    predict_ious,
)
from iou_d2.detectors.pooler import has_box_gradients
from iou_d2.detectors.unitbox import UnitBox
from iou_d2.detectors.unitbox_inference import EllipseFit
from iou_d2.detectors.view_readers import (
    HEADS,
    IOU_NET_HEADS,
    DenseReader,
    RCNNReader,
    Reader,
)
from iou_d2.detectors.views import View
from iou_d2.errors import InputError


@dataclass(frozen=True)
class Found:
    """What a detector says of an image.

    Args:
        candidates: R that NMS is given, with `pred_ious` where IoUs are predicted; their boxes and
            scores are numbers.
        paths: name of a refinement -> the S detections after 0, 1, ... T steps, as far as they are
            from final scores: row by row the same boxes.
    """

    candidates: Instances
    paths: dict[str, list[Instances]] = field(default_factory=dict)


class Source(Protocol):
    """A detector, as the figures see it."""

    # What there is no figure of -> why.
    left_out: dict[str, str]

    def __call__(self, image: dict) -> Found:
        """Detectron2's standard input of one image -> what is found in it."""

    def finish(self, detections: Instances) -> Instances:
        """One step of a path -> what the detector would return, if it made so many steps."""


class CandidateSource:
    """Of a detector without an IoU branch that could refine boxes."""

    def __init__(self, reader: Reader):
        self.reader = reader
        why = "there is no IoU branch, as IoU-Net has one"
        self.left_out = {"refinement": why}

    def __call__(self, image: dict) -> Found:
        pixels = image["image"]
        reading = self.reader.read(View(pixels, tuple(pixels.shape[-2:])), is_own=True)
        return Found(usable(Instances.cat(list(reading.candidates))))

    def finish(self, detections: Instances) -> Instances:
        return detections


class IoUNetSource:
    """Of a detector with the heads of IoU-Net."""

    def __init__(self, detector: GeneralizedRCNN, ascent: GradientAscent | None, steps: int):
        """
        Args:
            ascent: of `steps` steps; None where boxes have no gradient.
            steps: T, of ascent and of regression.
        """
        self.detector = detector
        self.heads = detector.roi_heads
        self.ascent = ascent
        self.steps = steps
        why = "the pooler has no gradient for boxes"
        self.left_out = {} if ascent else {"ascent": why}

    def __call__(self, image: dict) -> Found:
        heads, postprocessor = self.heads, self.heads.postprocessor
        images = self.detector.preprocess_image([image])
        maps = self.detector.backbone(images.tensor)
        proposals, _ = self.detector.proposal_generator(images, maps, None)
        (candidates,) = heads.candidates(maps, proposals)
        features = heads.levels(maps)
        predict_ious([candidates], heads.iou_branch, features)
        candidates.pred_ious = postprocessor.calibration(candidates.pred_ious)
        candidates = usable(candidates)
        detections = postprocessor.suppress(candidates)
        paths = {}
        if self.ascent is not None:
            paths["ascent"] = self.ascended(detections, features)
        regress = partial(heads.regress_again, maps)
        paths["regression"] = self.regressed(detections, features, regress)
        return Found(candidates, paths)

    def ascended(self, detections: Instances, features: list[Tensor]) -> list[Instances]:
        seen: list[Instances] = []

        def observe(boxes: Tensor, ious: Tensor) -> None:
            seen.append(copied(detections, pred_boxes=Boxes(boxes), pred_ious=ious))

        ascent = replace(self.ascent, observe=observe)
        ascent([copied(detections)], self.heads.iou_branch, features)
        seen = seen or [detections]  # of no boxes
        return seen + seen[-1:] * (self.steps + 1 - len(seen))  # where all came to rest

    def regressed(
        self,
        detections: Instances,
        features: list[Tensor],
        regress: Callable[[list[Instances]], None],
    ) -> list[Instances]:
        step, path = IteratedRegression(1), []
        for number in range(self.steps + 1):
            now = copied(path[-1] if path else detections)
            refine = step if number else IteratedRegression(0)
            refine([now], self.heads.iou_branch, features, regress)
            path.append(now)
        return path

    def finish(self, detections: Instances) -> Instances:
        return self.heads.postprocessor.score(copied(detections))


def copied(detections: Instances, **fields) -> Instances:
    """Detections with a copy of their boxes, and some fields replaced."""
    boxes = Boxes(detections.pred_boxes.tensor.clone())
    return Instances(
        detections.image_size, **{**detections.get_fields(), "pred_boxes": boxes, **fields}
    )


def usable(candidates: Instances) -> Instances:
    """Those whose box and score are finite."""
    boxes, scores = candidates.pred_boxes.tensor, candidates.scores
    return candidates[boxes.isfinite().all(dim=1) & scores.isfinite()]


def source_of(cfg: CfgNode, detector: nn.Module, steps: int) -> Source:
    """The Source of a detector that was built of `cfg`; refinement makes `steps` steps.

    Raises InputError: what the detector sends to NMS is not known.
    """
    if isinstance(detector, DenseDetector):
        if isinstance(detector, UnitBox) and isinstance(detector.extract, EllipseFit):
            raise InputError(
                "MODEL.UNITBOX.INFERENCE 'ellipses' has no NMS that figures could be of: set it "
                "to 'nms'."
            )
        return CandidateSource(DenseReader(detector))
    if not isinstance(detector, GeneralizedRCNN):
        raise InputError(
            f"There are no figures of MODEL.META_ARCHITECTURE {type(detector).__name__}: it has no "
            "NMS by class."
        )
    if not isinstance(detector.roi_heads, HEADS):
        raise InputError(
            f"MODEL.ROI_HEADS.NAME is {type(detector.roi_heads).__name__}, whose candidates are "
            f"not known before NMS: {', '.join(x.__name__ for x in HEADS)} take its weights."
        )
    if detector.proposal_generator is None:
        raise InputError("Figures need an RPN: MODEL.LOAD_PROPOSALS is True.")
    if not isinstance(detector.roi_heads, IOU_NET_HEADS):
        return CandidateSource(RCNNReader(detector))
    return IoUNetSource(detector, ascent_of(cfg, detector, steps), steps)


def ascent_of(cfg: CfgNode, detector: GeneralizedRCNN, steps: int) -> GradientAscent | None:
    """The ascent that MODEL.IOU_NET describes, of `steps` steps."""
    if not has_box_gradients(detector.roi_heads.iou_branch.pooler):
        return None
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.IOU_NET.REFINE_BY, cfg.MODEL.IOU_NET.REFINE_STEPS = "ascent", max(steps, 1)
    return replace(build_postprocessor(cfg).refiner, steps=steps)
