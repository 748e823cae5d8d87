"""How the predictions of each kind of dense detector are read for all images of a batch at once.

Shape letters: N images, K classes, L levels, R the points or anchors of one level, M candidates of
an image. Boxes are XYXY in pixels of the network input.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from iou_d2.detectors import retinanet_parts
from iou_d2.detectors.dense import DenseDetector, DenseNMS, PyramidDetector
from iou_d2.detectors.multibox_detector import MultiBoxDetector
from iou_d2.detectors.point_detector import PointDetector
from iou_d2.detectors.retinanet import BoxLossRetinaNet
from iou_d2.detectors.retinanet_parts import as_predicted, clipped_with_area
from iou_d2.detectors.unitbox import PixelPredictions, UnitBox
from iou_d2.detectors.unitbox_inference import PixelNMS, boxes_of
from iou_d2.errors import InputError

from .candidates import Candidates, clipped, joined, top, without_empty
from .multibox_readers import MultiBoxReader
from .reader import Reader, as_one_image, number_of_images


class PyramidReader(Reader):
    """Of a PyramidDetector: what `rank` and `boxes` say."""

    def __init__(self, detector: PyramidDetector):
        self.detector = detector
        self.nms = detector.nms

    def raw(self, predictions: list, size: tuple[int, int]) -> dict[str, Tensor]:
        levels = []
        for level in predictions:
            count, level = number_of_images(level), as_one_image(level)
            ranked = self.detector.rank(level, 0)
            index = torch.arange(ranked["scores"].shape[0])
            boxes = self.detector.boxes(level, 0, index, size)
            ranked = {name: x.reshape(count, -1, x.shape[1]) for name, x in ranked.items()}
            levels.append({"boxes": boxes.reshape(count, -1, 4), **ranked})
        return {name: torch.cat([x[name] for x in levels], dim=1) for name in levels[0]}

    def candidates(self, predictions: list, size: tuple[int, int]) -> Candidates:
        return joined([self.of_level(level, size) for level in predictions])

    def of_level(self, level: Any, size: tuple[int, int]) -> Candidates:
        """The best `topk` of one level."""
        count, level = number_of_images(level), as_one_image(level)
        ranked = self.detector.rank(level, 0)
        flat = {name: x.reshape(count, -1) for name, x in ranked.items()}  # (N, RK)
        # NaN is over no threshold.
        scores = torch.where(flat["scores"] > 0, flat["scores"], 0.0)
        scores, index = top(scores, self.nms.topk)
        classes = ranked["scores"].shape[1]
        anchors = index // classes
        # Where the anchors of an image begin among those of all.
        first = torch.arange(count)[:, None] * (flat["scores"].shape[1] // classes)
        boxes = self.detector.boxes(level, 0, (anchors + first).reshape(-1), size)
        return Candidates(
            boxes.view(count, -1, 4),
            scores,
            index - anchors * classes,
            {name: x.gather(1, index) for name, x in flat.items() if name != "scores"},
        )


# What a RetinaNet does with the candidates of a level, and the same of a batch.
BEFORE_NMS = {
    as_predicted: lambda candidates, size: candidates,
    retinanet_parts.clipped: clipped,
    clipped_with_area: lambda candidates, size: without_empty(clipped(candidates, size)),
}


class AnchorReader(PyramidReader):
    """Of a RetinaNet, whose boxes may be cut at the edges before NMS."""

    def of_level(self, level: Any, size: tuple[int, int]) -> Candidates:
        return BEFORE_NMS[self.detector.before_nms](super().of_level(level, size), size)


class PointReader(PyramidReader):
    """Of a PointDetector, whose scores may be others than those that choose its candidates."""

    def raw(self, predictions: list, size: tuple[int, int]) -> dict[str, Tensor]:
        found = super().raw(predictions, size)
        return {**found, "scores": self.score(found["scores"], found)}

    def of_level(self, level: Any, size: tuple[int, int]) -> Candidates:
        found = super().of_level(level, size)
        found = found._replace(scores=self.score(found.scores, found.fields))
        return without_empty(found) if self.detector.inference.drop_empty else found

    def score(self, chosen_by: Tensor, fields: dict[str, Tensor]) -> Tensor:
        """The scores, 0 where `chosen_by` is."""
        quality = fields.get(self.detector.quality.field)
        if quality is None:
            return chosen_by
        score = self.detector.inference.score(fields["cls_scores"], quality)
        return torch.where(chosen_by > 0, score, 0.0)


class PixelReader(Reader):
    """Of UnitBox with NMS: what PixelNMS does.

    Half a stride of pixels at the edges of an image have the scores of their neighbours, but for
    rounding, and which of them is a peak and suppresses the others is up to the runtime.
    """

    doubtful = 0.2

    def __init__(self, detector: UnitBox):
        self.nms = detector.extract.nms

    def raw(self, predictions: PixelPredictions, size: tuple[int, int]) -> dict[str, Tensor]:
        logits, distances = (x[:, :, : size[0], : size[1]] for x in predictions[:2])
        points = torch.arange(logits.shape[2] * logits.shape[3])
        points = torch.stack([points % size[1], points // size[1]], dim=1) + 0.5
        return {
            "boxes": boxes_of(points, distances.flatten(2).transpose(1, 2)),
            "scores": logits.sigmoid().flatten(2).transpose(1, 2),
        }

    def candidates(self, predictions: PixelPredictions, size: tuple[int, int]) -> Candidates:
        logits, distances = (x[:, :, : size[0], : size[1]] for x in predictions[:2])
        count, classes = logits.shape[:2]
        peaks = logits == F.max_pool2d(logits, kernel_size=3, stride=1, padding=1)
        scores = (logits.sigmoid() * peaks).flatten(2)  # (N, K, HW)
        scores = torch.where(scores > self.nms.score_threshold, scores, 0.0)
        scores, pixels = top(scores.flatten(0, 1), self.nms.topk)  # (NK, topk)
        scores, pixels = (x.view(count, -1) for x in (scores, pixels))
        points = torch.stack([pixels % size[1], pixels // size[1]], dim=-1) + 0.5
        index = pixels[:, None].expand(-1, 4, -1)
        sides = distances.flatten(2).gather(2, index).transpose(1, 2)
        numbers = torch.arange(classes).repeat_interleave(self.nms.topk).expand(count, -1)
        return without_empty(Candidates(boxes_of(points, sides), scores, numbers, {}))


def reader_of(detector: DenseDetector) -> Reader:
    """The reader of a detector. Raises InputError where there is none."""
    nms = getattr(detector, "nms", None)
    if nms is not None and not isinstance(nms, DenseNMS):
        raise InputError(
            f"{type(nms).__name__} is a loop that no graph can hold: set the key that chooses it "
            "to hard NMS to export this detector."
        )
    if isinstance(detector, UnitBox):
        if not isinstance(detector.extract, PixelNMS):
            raise InputError(
                "UnitBox fits its ellipses with OpenCV, which no graph can hold: set "
                "MODEL.UNITBOX.INFERENCE nms to export it."
            )
        return PixelReader(detector)
    kinds = (
        (PointDetector, PointReader),
        (BoxLossRetinaNet, AnchorReader),
        (PyramidDetector, PyramidReader),
        (MultiBoxDetector, MultiBoxReader),
    )
    for kind, reader in kinds:
        if isinstance(detector, kind) and type(detector).candidates is kind.candidates:
            return reader(detector)
    raise InputError(
        f"MODEL.META_ARCHITECTURE {type(detector).__name__} cannot be exported: only RetinaNet, "
        "IoU-aware RetinaNet, the point detectors, UnitBox, SSD and RefineDet can."
    )
