"""SSD (Liu et al., arXiv 1512.02325), with any loss of its boxes, and IoU-aware SSD.

Shape letters and words are those of multibox.py; A are the boxes of a cell of a level. `iou_logits`
are predicted IoUs before the sigmoid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from .default_boxes import DefaultBoxes, build_default_boxes
from .iou_awareness import IoUAwareness, build_iou_awareness
from .multibox import (
    LevelConvs,
    MultiBoxLoss,
    MultiBoxTerms,
    build_matcher,
    build_multibox_loss,
    shapes_of,
)
from .multibox_detector import MultiBoxDetector
from .multibox_inference import class_scores


class SSDPrediction(NamedTuple):
    """What SSD says of the default boxes of all levels."""

    anchors: Boxes  # R
    logits: Tensor  # (N, R, K + 1), the background last
    deltas: Tensor  # (N, R, 4)
    iou_logits: Tensor | None = None  # (N, R, 1)
    # (N, R, K), in the place of the softmax of `logits`: for what is no softmax.
    scores: Tensor | None = None

    def class_scores(self, images: int | slice = slice(None)) -> Tensor:
        """(N, R, K), or (R, K) of one image."""
        if self.scores is None:
            return class_scores(self.logits[images])
        return self.scores[images]


class SSDHead(nn.Module):
    """Class scores and deltas of every default box."""

    def __init__(
        self, shapes: Sequence[ShapeSpec], num_cell_boxes: Sequence[int], num_classes: int
    ):
        """Takes the channels of the L features, the boxes of a cell of each, and K."""
        super().__init__()
        self.cls_score = LevelConvs(shapes, num_cell_boxes, num_classes + 1)
        self.bbox_pred = LevelConvs(shapes, num_cell_boxes, 4)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """L features (N, C, H, W) -> logits (N, R, K + 1), deltas (N, R, 4)."""
        return self.cls_score(features), self.bbox_pred(features)


class IoUAwareSSDHead(SSDHead):
    """SSDHead and, as IoU-aware RetinaNet (arXiv 1912.05992), one more conv: the predicted IoU."""

    def __init__(
        self, shapes: Sequence[ShapeSpec], num_cell_boxes: Sequence[int], num_classes: int
    ):
        super().__init__(shapes, num_cell_boxes, num_classes)
        self.iou_pred = LevelConvs(shapes, num_cell_boxes, 1)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """L features -> those of SSDHead and iou_logits (N, R, 1)."""
        return (*super().forward(features), self.iou_pred(features))


@META_ARCH_REGISTRY.register()
class SSD(MultiBoxDetector):
    """A backbone and a head; its predictions are an SSDPrediction.

    Images of any size are taken, but sizes of default boxes are those for INPUT.SQUARE_SIZE: the
    augmentation "square" brings images to it.
    """

    @configurable
    def __init__(
        self,
        *,
        default_boxes: DefaultBoxes,
        loss: MultiBoxLoss,
        **kwargs,
    ):
        """
        Args:
            loss: of classes and boxes.
            kwargs: those of MultiBoxDetector; `head` makes the tensors of an SSDPrediction.
        """
        super().__init__(**kwargs)
        self.default_boxes = default_boxes
        self.loss = loss

    @classmethod
    def from_config(cls, cfg):
        arguments = super().from_config(cfg)
        shapes = shapes_of(cfg, arguments["backbone"].output_shape())
        boxes = build_default_boxes(cfg, [shape.stride for shape in shapes])
        matcher = build_matcher(cfg.MODEL.MULTIBOX.IOU_THRESHOLDS, "MODEL.MULTIBOX.IOU_THRESHOLDS")
        return {
            **arguments,
            "head": cls.build_head(shapes, boxes.num_cell_boxes, cfg.MODEL.RETINANET.NUM_CLASSES),
            "default_boxes": boxes,
            "loss": build_multibox_loss(cfg, matcher),
        }

    build_head = SSDHead

    def predict(self, images: Tensor) -> SSDPrediction:
        """Images (N, 3, H, W) -> what is said of each of their default boxes."""
        features = self.features(images)
        return SSDPrediction(self.default_boxes(features), *self.head(features))

    def losses(
        self,
        predictions: SSDPrediction,
        image_sizes: list[tuple[int, int]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """The losses "loss_cls" and "loss_box", both sums divided by the number of positive boxes
        of the batch: the mean over processes, at least 1."""
        return self.divided(self.terms(predictions, gt_instances))

    def terms(self, predictions: SSDPrediction, gt_instances: list[Instances]) -> MultiBoxTerms:
        """The sums of the losses, and what the boxes of the batch learnt."""
        anchors = predictions.anchors.tensor.expand(len(gt_instances), -1, -1)
        num_classes = predictions.logits.shape[-1] - 1
        assignment = self.loss.assign(anchors, gt_instances, num_classes)
        return self.loss(anchors, predictions.logits, predictions.deltas, assignment)

    def rank(self, predictions: SSDPrediction, image: int) -> dict[str, Tensor]:
        """{"scores": (R, K)}, the confidences of an image, and whatever else detections carry."""
        return {"scores": predictions.class_scores(image)}

    def boxes(self, predictions: SSDPrediction, image: int, index: Tensor | slice) -> Tensor:
        return self.loss.transform.apply_deltas(
            predictions.deltas[image, index], predictions.anchors.tensor[index]
        )


@META_ARCH_REGISTRY.register()
class IoUAwareSSD(SSD):
    """SSD whose confidence knows how well a box fits: p^alpha * IoU^(1 - alpha), as in IoU-aware
    RetinaNet, from whose keys it is built.

    Detections carry `cls_scores` (p) and `pred_ious` beside `scores`.
    """

    @configurable
    def __init__(self, *, iou_awareness: IoUAwareness, **kwargs):
        """
        Args:
            iou_awareness: what the predicted IoU learns, and what it does to the confidence.
            kwargs: those of SSD; `head` is an IoUAwareSSDHead.
        """
        super().__init__(**kwargs)
        self.iou_awareness = iou_awareness

    build_head = IoUAwareSSDHead

    @classmethod
    def from_config(cls, cfg):
        return {**super().from_config(cfg), "iou_awareness": build_iou_awareness(cfg)}

    def losses(
        self,
        predictions: SSDPrediction,
        image_sizes: list[tuple[int, int]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """Those of SSD and "loss_iou" of the positive boxes, divided by their number alike."""
        terms = self.terms(predictions, gt_instances)
        iou_logits = predictions.iou_logits.squeeze(2)[terms.positive]
        loss = self.iou_awareness.loss(iou_logits, terms.predicted, terms.gt_boxes)
        return {**self.divided(terms), "loss_iou": loss / terms.count}

    def rank(self, predictions: SSDPrediction, image: int) -> dict[str, Tensor]:
        probability = predictions.class_scores(image)  # (R, K)
        if predictions.iou_logits is None:
            return {"scores": probability}
        return self.iou_awareness.rank(probability, predictions.iou_logits[image])
