"""UnitBox (Yu et al., arXiv 1608.01471).

A fully convolutional detector: every pixel of the input says whether it lies on an object and how
far the sides of the object's box are from it.

Shape letters: N images, K classes, H x W pixels of the network input, G objects of an image,
P positive pixels. Boxes are XYXY in pixels of the network input. `distances` are those from a pixel
to the sides of its box in pixels: top, bottom, left, right. The pixel in row i and column j has its
centre at the point (j + 0.5, i + 0.5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Instances
from torch import Tensor, nn

from iou_d2.errors import InputError
from iou_d2.ops.box_losses import BoxLoss, build_box_loss

from .dense import DenseDetector, build_dense_nms, part_named, reduce_mean
from .unitbox_inference import EllipseFit, PixelNMS, boxes_of, distances_of

# Share of positive pixels that an untrained confidence branch predicts.
PRIOR_CONFIDENCE = 0.01
# Of smooth L1 as a box loss, in pixels.
SMOOTH_L1_BETA = 1.0


def in_box(u: Tensor, v: Tensor) -> Tensor:
    """All of an object's box is its region: Algorithm 1 of the paper."""
    return torch.ones(len(v), len(u), dtype=torch.bool, device=u.device)


def in_ellipse(u: Tensor, v: Tensor) -> Tensor:
    """The ellipse inscribed in the box of an object is its region: the confidence of Fig. 2."""
    return v.square()[:, None] + u.square() <= 1


# (u, v), the centres of w columns and h rows of pixels, from -1 at the left or upper side of a box
# to 1 at the other, -> whether they belong to its object: (h, w).
Region = Callable[[Tensor, Tensor], Tensor]
REGIONS: dict[str, Region] = {"box": in_box, "ellipse": in_ellipse}


def assign_pixels(boxes: Tensor, image_size: tuple[int, int], region: Region) -> Tensor:
    """The object that each pixel belongs to: of those whose region holds its centre the smallest.

    Args:
        boxes: (G, 4). One that holds no pixel's centre, or is not finite, gets no pixel.
        image_size: (H, W), without padding.
        region: which pixels of a box are its object's.

    Returns:
        (H, W) int64: the index of an object, -1 for background. The paper does not say what
        happens where objects overlap; of equally large ones the first wins.
    """
    owner = torch.full(image_size, -1, device=boxes.device)
    (finite,) = torch.where(boxes.isfinite().all(dim=1))
    area = (boxes[finite, 2:] - boxes[finite, :2]).prod(dim=1)
    corners = boxes.tolist()
    for index in finite[area.argsort(stable=True).flip(0)].tolist():
        x1, y1, x2, y2 = corners[index]
        rows, columns = _centers_between(y1, y2), _centers_between(x1, x2)
        y = torch.arange(image_size[0], device=owner.device)[rows] + 0.5
        x = torch.arange(image_size[1], device=owner.device)[columns] + 0.5
        mask = region((2 * x - x1 - x2) / (x2 - x1), (2 * y - y1 - y2) / (y2 - y1))
        owner[rows, columns][mask] = index
    return owner


def _centers_between(low: float, high: float) -> slice:
    """The pixels whose centres lie in [low, high)."""
    return slice(max(0, math.ceil(low - 0.5)), max(0, math.ceil(high - 0.5)))


class UnitBoxHead(nn.Module):
    """The confidence and the box branch: a 3x3 conv each, then upsampling to the input."""

    def __init__(self, confidence_shape: ShapeSpec, box_shape: ShapeSpec, num_classes: int):
        """Takes the channels and the stride of the feature that each branch reads."""
        super().__init__()
        self.confidence = nn.Conv2d(confidence_shape.channels, num_classes, 3, padding=1)
        self.box = nn.Conv2d(box_shape.channels, 4, 3, padding=1)
        self.confidence_stride = confidence_shape.stride
        self.box_stride = box_shape.stride
        nn.init.normal_(self.confidence.weight, std=0.01)
        nn.init.constant_(self.confidence.bias, math.log(PRIOR_CONFIDENCE / (1 - PRIOR_CONFIDENCE)))
        # The first boxes reach about a stride to each side, since a ReLU at 0 has no gradient.
        nn.init.normal_(self.box.weight, std=0.001)
        nn.init.ones_(self.box.bias)

    def forward(
        self, confidence_feature: Tensor, box_feature: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Two features -> logits (N, K, H, W) of the confidence and distances (N, 4, H, W).

        The conv of the box branch predicts in strides, so that weights of usual size do.
        """
        logits = _upsample(self.confidence(confidence_feature), self.confidence_stride, size)
        distances = _upsample(self.box(box_feature), self.box_stride, size)
        return logits, F.relu(distances * self.box_stride)


def _upsample(x: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
    """Bilinear interpolation by `stride`, in float32, cropped to `size`."""
    x = F.interpolate(x.float(), scale_factor=stride, mode="bilinear", align_corners=False)
    return x[:, :, : size[0], : size[1]]


class PixelPredictions(NamedTuple):
    """What UnitBox says of every pixel."""

    logits: Tensor  # (N, K, H, W), confidence before the sigmoid
    distances: Tensor  # (N, 4, H, W)
    # A scalar 0 with a gradient to every feature: DistributedDataParallel waits for all parameters.
    zero: Tensor

    def of_image(self, image: int, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Logits (K, h, w) and distances (4, h, w) of an image (h, w) without its padding, which
        counts neither in the losses nor as a detection."""
        height, width = image_size
        return self.logits[image, :, :height, :width], self.distances[image, :, :height, :width]


@META_ARCH_REGISTRY.register()
class UnitBox(DenseDetector):
    """One confidence map a class and one map of boxes, both as large as the image."""

    @configurable
    def __init__(
        self,
        *,
        head: UnitBoxHead,
        head_in_features: tuple[str, str],
        extract: PixelNMS | EllipseFit,
        region: Region = in_ellipse,
        box_loss: BoxLoss,
        box_loss_weight: float = 1.0,
        confidence_loss_weight: float = 1.0,
        **kwargs,
    ):
        """
        Args:
            head: takes the two features that `head_in_features` names: confidence, box.
            extract: from the maps of an image to its detections.
            region: the positive pixels of an object.
            box_loss: of the sides of the boxes, in pixels.
            box_loss_weight, confidence_loss_weight: factors of the two losses.
            kwargs: those of DenseDetector.
        """
        super().__init__(**kwargs)
        self.head = head
        self.head_in_features = head_in_features
        self.extract = extract
        self.region = region
        self.box_loss = box_loss
        self.box_loss_weight = box_loss_weight
        self.confidence_loss_weight = confidence_loss_weight

    @classmethod
    def from_config(cls, cfg):
        arguments, node = super().from_config(cfg), cfg.MODEL.UNITBOX
        names = (node.CONFIDENCE_FEATURE, node.BOX_FEATURE)
        shapes = arguments["backbone"].output_shape()
        missing = set(names) - set(shapes)
        if missing:
            raise InputError(
                f"MODEL.UNITBOX reads the features {names}, but the backbone "
                f"{cfg.MODEL.BACKBONE.NAME} puts out {', '.join(shapes)}."
            )
        shapes = [shapes[name] for name in names]
        return {
            **arguments,
            "head": UnitBoxHead(*shapes, cfg.MODEL.RETINANET.NUM_CLASSES),
            "head_in_features": names,
            "extract": _build_extract(cfg),
            "region": part_named(REGIONS, node.REGION, "MODEL.UNITBOX.REGION"),
            "box_loss": build_box_loss(
                node.BOX_LOSS, SMOOTH_L1_BETA, "MODEL.UNITBOX.BOX_LOSS", cfg.MODEL.INVERTED_BOXES
            ),
            "box_loss_weight": node.BOX_LOSS_WEIGHT,
            "confidence_loss_weight": node.CONFIDENCE_LOSS_WEIGHT,
        }

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        # Files of torchvision hold a backbone alone: "features.0.weight" without "backbone.".
        for name in self.backbone.state_dict():
            if prefix + name in state_dict:
                state_dict[f"{prefix}backbone.{name}"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def predict(self, images: Tensor) -> PixelPredictions:
        """Images (N, 3, H, W) -> what is said of each of their pixels."""
        features = self.backbone(images)
        maps = self.head(*(features[name] for name in self.head_in_features), images.shape[-2:])
        return PixelPredictions(*maps, 0 * sum(x.float().mean() for x in features.values()))

    def losses(
        self,
        predictions: PixelPredictions,
        image_sizes: list[tuple[int, int]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """The losses "loss_confidence", the sigmoid cross-entropy over all pixels and classes,
        divided by the number of pixels, and "loss_box" over the positive pixels, divided by theirs.

        Both numbers are means over processes and at least 1.
        """
        confidence_loss = box_loss = positives = pixels = 0
        for image, (size, truth) in enumerate(zip(image_sizes, gt_instances)):
            logits, distances = predictions.of_image(image, size)
            if (truth.gt_classes >= len(logits)).any():
                raise ValueError(
                    f"A ground truth has the class {truth.gt_classes.max()}, but "
                    f"MODEL.RETINANET.NUM_CLASSES is {len(logits)}."
                )
            owner = assign_pixels(truth.gt_boxes.tensor, size, self.region)
            rows, columns = torch.nonzero(owner >= 0, as_tuple=True)  # (P,)
            owner = owner[rows, columns]
            target = torch.zeros_like(logits)
            target[truth.gt_classes[owner], rows, columns] = 1
            confidence_loss += F.binary_cross_entropy_with_logits(logits, target, reduction="sum")

            points = torch.stack([columns, rows], dim=1) + 0.5
            expected = distances_of(points, truth.gt_boxes.tensor[owner])
            # As boxes around the origin distances keep all their digits.
            origin = points.new_zeros(2)
            boxes = boxes_of(origin, distances[:, rows, columns].t())
            box_loss += self.box_loss.of_sides(boxes, boxes_of(origin, expected)).sum()
            positives += len(rows)
            pixels += logits[0].numel()

        counts = torch.tensor([pixels, positives], dtype=torch.float32, device=self.device)
        pixels, positives = reduce_mean(counts).clamp(min=1)
        return {
            "loss_confidence": self.confidence_loss_weight * confidence_loss / pixels,
            "loss_box": self.box_loss_weight * box_loss / positives + predictions.zero,
        }

    def image_candidates(
        self, predictions: PixelPredictions, image_sizes: list[tuple[int, int]]
    ) -> list[list[Instances]]:
        return [
            self.extract.candidates(*predictions.of_image(image, size))
            for image, size in enumerate(image_sizes)
        ]

    def suppress(self, candidates: Sequence[Instances]) -> Instances:
        return self.extract.suppress(candidates)


def _build_extract(cfg) -> PixelNMS | EllipseFit:
    node, key = cfg.MODEL.UNITBOX, "MODEL.UNITBOX.INFERENCE"
    parts = {
        "nms": PixelNMS(build_dense_nms(cfg)),
        "ellipses": EllipseFit(node.REGION_THRESH_TEST, cfg.TEST.DETECTIONS_PER_IMAGE),
    }
    return part_named(parts, node.INFERENCE, key)
