"""What SSD and RefineDet are built of alike.

Shape letters and words are those of multibox.py.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from detectron2.structures import Instances
from torch import Tensor, nn

from .dense import DenseDetector, DenseNMS
from .multibox import MultiBoxTerms
from .multibox_inference import SoftNMS, build_multibox_nms, candidates_of


class MultiBoxDetector(DenseDetector):
    """A backbone and a head with convolutions for each level. A detector adds `predict`, `losses`,
    `rank` and `boxes`."""

    def __init__(
        self,
        *,
        head: nn.Module,
        head_in_features: Sequence[str],
        box_loss_weight: float = 1.0,
        nms: DenseNMS | SoftNMS,
        clip_before_nms: bool = False,
        **kwargs,
    ):
        """
        Args:
            head: from L features to the tensors of a prediction.
            head_in_features: names of these features.
            box_loss_weight: factor of all losses of boxes.
            nms: from the candidates of an image, its `topk` best of each class, to detections.
            clip_before_nms: cut boxes at the image before NMS compares them.
            kwargs: those of DenseDetector.
        """
        super().__init__(**kwargs)
        self.head = head
        self.head_in_features = list(head_in_features)
        self.box_loss_weight = box_loss_weight
        self.nms = nms
        self.clip_before_nms = clip_before_nms

    @classmethod
    def from_config(cls, cfg):
        node = cfg.MODEL.MULTIBOX
        return {
            **super().from_config(cfg),
            "head_in_features": cfg.MODEL.RETINANET.IN_FEATURES,
            "box_loss_weight": node.BOX_LOSS_WEIGHT,
            "nms": build_multibox_nms(cfg),
            "clip_before_nms": node.CLIP_BEFORE_NMS,
        }

    def features(self, images: Tensor) -> list[Tensor]:
        """The L features that the head reads."""
        features = self.backbone(images)
        return [features[name] for name in self.head_in_features]

    def image_candidates(
        self, predictions: Any, image_sizes: list[tuple[int, int]]
    ) -> list[list[Instances]]:
        return [
            [self.candidates(predictions, image, size)] for image, size in enumerate(image_sizes)
        ]

    def suppress(self, candidates: Sequence[Instances]) -> Instances:
        return self.nms(candidates)

    def candidates(self, predictions: Any, image: int, image_size: tuple[int, int]) -> Instances:
        """What an image sends to NMS: the best boxes of each class, with all that `rank` says."""

        def boxes(index: Tensor) -> Tensor:
            return self.boxes(predictions, image, index)

        ranked = self.rank(predictions, image)
        return candidates_of(ranked, boxes, self.nms, image_size, self.clip_before_nms)

    @abstractmethod
    def rank(self, predictions: Any, image: int) -> dict[str, Tensor]:
        """{"scores": (R, K)}, the confidences of an image, and whatever else detections carry."""

    @abstractmethod
    def boxes(self, predictions: Any, image: int, index: Tensor | slice) -> Tensor:
        """What the default boxes `index` (S,) of an image predict: (S, 4)."""

    def divided(self, terms: MultiBoxTerms, prefix: str = "loss") -> dict[str, Tensor]:
        """The losses of classes and of boxes by name, over the number of positive boxes."""
        return {
            f"{prefix}_cls": terms.cls / terms.count,
            f"{prefix}_box": self.box_loss_weight * terms.box / terms.count,
        }
