"""What the dense detectors share: the way from images to losses or detections, and from the scores
of all points to the detections of an image.

Every one of them is `predict(images) -> predictions`, and from these `losses(predictions,
image_sizes, gt_instances)` or `detect(predictions, image_sizes)`. `predictions` hold the points or
anchors with what was said of them; their type is the detector's own. `detect` is what an image
sends to NMS, and then `suppress`: test-time augmentation puts several views of an image in between.

Shape letters: N images, K classes, L levels, R the points or anchors of one level, S candidates.
Boxes are XYXY in pixels of the network input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from iou_d2.errors import InputError
from iou_d2.ops.nms import best_of_nms

from .visualize import is_time_to_draw, visualize_training


class DenseDetector(nn.Module, ABC):
    """A backbone and what reads its features. A detector adds `predict`, `losses`,
    `image_candidates` and `suppress`."""

    def __init__(
        self,
        *,
        backbone: Backbone,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        vis_period: int = 0,
        input_format: str = "BGR",
    ):
        """
        Args:
            pixel_mean, pixel_std: of the channels of the images.
            vis_period: iterations between two pictures of the training; 0 draws none.
            input_format: what the channels of the images are.
        """
        super().__init__()
        self.backbone = backbone
        self.vis_period = vis_period
        self.input_format = input_format
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg):
        return {
            "backbone": build_backbone(cfg),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "vis_period": cfg.VIS_PERIOD,
            "input_format": cfg.INPUT.FORMAT,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict]):
        """Detectron2's standard input -> losses by name while training; else one
        {"instances": Instances} an image, at the size that the image asks for."""
        images = self.preprocess_image(batched_inputs)
        predictions = self.predict(images.tensor)
        if not self.training:
            detections = self.detect(predictions, images.image_sizes)
            return rescale_detections(detections, batched_inputs)
        gt_instances = [x["instances"].to(self.device) for x in batched_inputs]
        losses = self.losses(predictions, images.image_sizes, gt_instances)
        if is_time_to_draw(self.vis_period):
            detections = self.detect(predictions, images.image_sizes)
            visualize_training(batched_inputs[0], detections[0], self.input_format)
        return losses

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """The N images on the device of the model, normalised by channel and padded with 0 to one
        size that the backbone divides."""
        images = [
            (x["image"].to(self.device) - self.pixel_mean) / self.pixel_std for x in batched_inputs
        ]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)

    @abstractmethod
    def predict(self, images: Tensor) -> Any:
        """What the network says of images (N, channels, H, W) from `preprocess_image`."""

    @abstractmethod
    def losses(
        self,
        predictions: Any,
        image_sizes: list[tuple[int, int]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """The losses by name, each finite and with a gradient to what it predicts from where the N
        images hold no object.

        Args:
            image_sizes: (height, width) of each image without its padding.
            gt_instances: N, with `gt_boxes` and `gt_classes` in 0..K - 1.
        """

    @torch.no_grad()
    def detect(self, predictions: Any, image_sizes: list[tuple[int, int]]) -> list[Instances]:
        """The detections of N images at the size of the network input, best first."""
        return [self.suppress(x) for x in self.image_candidates(predictions, image_sizes)]

    @abstractmethod
    def image_candidates(
        self, predictions: Any, image_sizes: list[tuple[int, int]]
    ) -> list[list[Instances]]:
        """What each of N images sends to `suppress`: one or more Instances, such as one a level."""

    @abstractmethod
    def suppress(self, candidates: Sequence[Instances]) -> Instances:
        """All candidates of one image -> its detections, best first."""


class PyramidDetector(DenseDetector):
    """A DenseDetector whose predictions are a list of one entry a level of its features.

    A detector adds `predict`, `losses`, `rank` and `boxes`.
    """

    def __init__(
        self, *, head: nn.Module, head_in_features: Sequence[str], nms: DenseNMS, **kwargs
    ):
        """
        Args:
            head: what turns L features (N, C, H, W) into predictions.
            head_in_features: names of these features.
            nms: from the candidates of all levels to detections.
            kwargs: those of DenseDetector.
        """
        super().__init__(**kwargs)
        self.head = head
        self.head_in_features = list(head_in_features)
        self.nms = nms

    def features(self, images: Tensor) -> list[Tensor]:
        """The L features that the head reads."""
        features = self.backbone(images)
        return [features[name] for name in self.head_in_features]

    def image_candidates(
        self, predictions: list, image_sizes: list[tuple[int, int]]
    ) -> list[list[Instances]]:
        return [
            [self.candidates(level, image, size) for level in predictions]
            for image, size in enumerate(image_sizes)
        ]

    def suppress(self, candidates: Sequence[Instances]) -> Instances:
        return self.nms(candidates)

    def candidates(self, prediction: Any, image: int, image_size: tuple[int, int]) -> Instances:
        """What one level of one image sends to NMS: its best entries, with all that `rank` says."""
        ranked = self.rank(prediction, image)
        chosen = select_candidates(ranked["scores"], 0.0, self.nms.topk)
        boxes = self.boxes(prediction, image, chosen.anchors, image_size)
        fields = {name: value[chosen.anchors, chosen.classes] for name, value in ranked.items()}
        return Instances(image_size, pred_boxes=Boxes(boxes), pred_classes=chosen.classes, **fields)

    @abstractmethod
    def rank(self, prediction: Any, image: int) -> dict[str, Tensor]:
        """{"scores": (R, K)}, the confidence of a level of an image, 0 where it is below the
        threshold, and whatever else (R, K) detections carry."""

    @abstractmethod
    def boxes(
        self, prediction: Any, image: int, index: Tensor, image_size: tuple[int, int]
    ) -> Tensor:
        """The boxes (S, 4) of the points or anchors `index` (S,) of a level of an image."""


class Selection(NamedTuple):
    """The entries of an (R, K) score matrix that go on to NMS, best first: each (S,)."""

    scores: Tensor
    anchors: Tensor
    classes: Tensor


def select_candidates(scores: Tensor, threshold: float, topk: int) -> Selection:
    """The `topk` highest entries of `scores` (R, K) above `threshold`, best first; of equal ones
    among these the first comes first."""
    above = scores > threshold
    anchors, classes = torch.nonzero(above, as_tuple=True)
    scores = scores[above]
    chosen = scores.topk(min(topk, len(anchors))).indices.sort().values
    scores, order = scores[chosen].sort(descending=True, stable=True)
    return Selection(scores, anchors[chosen[order]], classes[chosen[order]])


@dataclass(frozen=True)
class DenseNMS:
    """From the candidates of an image to its detections.

    Args:
        score_threshold: a candidate's score is over it.
        topk: candidates of a level at most, the best.
        nms_threshold: an IoU over it suppresses.
        max_detections: of an image; negative for all.
        class_agnostic: let a box suppress those of other classes.
    """

    score_threshold: float
    topk: int
    nms_threshold: float
    max_detections: int
    class_agnostic: bool = False

    def __call__(self, levels: Sequence[Instances]) -> Instances:
        """Candidates of all levels of one image -> its detections, best first. Candidates whose
        box is not finite are left out."""
        candidates = Instances.cat(list(levels))
        classes = candidates.pred_classes
        keep = best_of_nms(
            candidates.pred_boxes.tensor,
            candidates.scores,
            torch.zeros_like(classes) if self.class_agnostic else classes,
            self.nms_threshold,
            self.max_detections,
        )
        return candidates[keep]


def build_dense_nms(cfg, class_agnostic: bool = False) -> DenseNMS:
    """The DenseNMS of the test keys of MODEL.RETINANET, which all dense detectors share."""
    node = cfg.MODEL.RETINANET
    return DenseNMS(
        score_threshold=node.SCORE_THRESH_TEST,
        topk=node.TOPK_CANDIDATES_TEST,
        nms_threshold=node.NMS_THRESH_TEST,
        max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
        class_agnostic=class_agnostic,
    )


def first(detections: Instances, count: int) -> Instances:
    """The first `count` detections; all where it is negative."""
    return detections if count < 0 else detections[:count]


def rescale_detections(detections: Sequence[Instances], batched_inputs: list[dict]) -> list[dict]:
    """Detectron2's standard output: boxes scaled to the size that each input asks for."""
    outputs = []
    for instances, image in zip(detections, batched_inputs):
        height, width = instances.image_size
        resized = detector_postprocess(
            instances, image.get("height", height), image.get("width", width)
        )
        outputs.append({"instances": resized})
    return outputs


def reduce_mean(value: Tensor) -> Tensor:
    """Mean of a scalar over all processes, without gradient."""
    value = value.detach().clone()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def part_named(parts: dict[str, Any], name: str, key: str) -> Any:
    """The part that the config `key` names; an InputError that lists all names for another one."""
    if name not in parts:
        names = " or ".join(map(repr, parts)) if len(parts) == 2 else f"one of {', '.join(parts)}"
        raise InputError(f"{key} is {names}, but it is {name!r}.")
    return parts[name]


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple that is at least `size`."""
    return -(-size // multiple) * multiple
