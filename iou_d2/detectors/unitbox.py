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
from collections.abc import Callable

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.backbone import Backbone
from detectron2.structures import Instances
from torch import Tensor, nn

from iou_d2.ops.box_losses import box_side_loss, check_kind

from .dense import normalized_images, postprocess, reduce_mean
from .unitbox_inference import EllipseFit, PixelNMS, boxes_of, distances_of
from .visualize import is_time_to_draw, visualize_training

# Share of positive pixels that an untrained confidence branch predicts.
PRIOR_CONFIDENCE = 0.01


def assign_pixels(boxes: Tensor, image_size: tuple[int, int], region: str) -> Tensor:
    """The object that each pixel belongs to: of those whose region holds its centre the smallest.

    Args:
        boxes: (G, 4). One that holds no pixel's centre gets no pixel.
        image_size: (H, W), without padding.
        region: "box", or "ellipse" for the one inscribed in it.

    Returns:
        (H, W) int64: the index of an object, -1 for background. The paper does not say what
        happens where objects overlap; of equally large ones the first wins.
    """
    owner = torch.full(image_size, -1, device=boxes.device)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    corners = boxes.tolist()
    for index in area.argsort(stable=True).flip(0).tolist():
        x1, y1, x2, y2 = corners[index]
        rows, columns = _centers_between(y1, y2), _centers_between(x1, x2)
        window = owner[rows, columns]
        if region == "box":
            window.fill_(index)
            continue
        y = torch.arange(image_size[0], device=owner.device)[rows] + 0.5
        x = torch.arange(image_size[1], device=owner.device)[columns] + 0.5
        u = (2 * x - x1 - x2) / (x2 - x1)
        v = (2 * y - y1 - y2) / (y2 - y1)
        window[v.square()[:, None] + u.square() <= 1] = index
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


@META_ARCH_REGISTRY.register()
class UnitBox(nn.Module):
    """One confidence map a class and one map of boxes, both as large as the image."""

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: UnitBoxHead,
        head_in_features: tuple[str, str],
        detect: Callable[[Tensor, Tensor], Instances],
        region: str = "ellipse",
        box_loss: str = "unitbox",
        box_loss_weight: float = 1.0,
        confidence_loss_weight: float = 1.0,
        pixel_mean: tuple[float, ...],
        pixel_std: tuple[float, ...],
        vis_period: int = 0,
        input_format: str = "BGR",
    ):
        """
        Args:
            backbone: a Detectron2 backbone.
            head: takes the two features that `head_in_features` names: confidence, box.
            detect: a PixelNMS or an EllipseFit.
            region: the positive pixels of an object, see `assign_pixels`.
            box_loss: see `box_side_loss`; lengths are in pixels.
            box_loss_weight, confidence_loss_weight: factors of the two losses.
            pixel_mean, pixel_std: of the channels of the input.
            vis_period: iterations between two pictures of the training; 0 draws none.
            input_format: what the channels of the input are.
        """
        super().__init__()
        if region not in ("box", "ellipse"):
            raise ValueError(f"MODEL.UNITBOX.REGION is 'box' or 'ellipse', but it is {region!r}.")
        check_kind(box_loss, "MODEL.UNITBOX.BOX_LOSS")
        self.backbone = backbone
        self.head = head
        self.head_in_features = head_in_features
        self.detect = detect
        self.region = region
        self.box_loss = box_loss
        self.box_loss_weight = box_loss_weight
        self.confidence_loss_weight = confidence_loss_weight
        self.vis_period = vis_period
        self.input_format = input_format
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg):
        node = cfg.MODEL.UNITBOX
        backbone = build_backbone(cfg)
        names = (node.CONFIDENCE_FEATURE, node.BOX_FEATURE)
        shapes = backbone.output_shape()
        missing = set(names) - set(shapes)
        if missing:
            raise ValueError(
                f"MODEL.UNITBOX reads the features {names}, but the backbone "
                f"{cfg.MODEL.BACKBONE.NAME} puts out {', '.join(shapes)}."
            )
        return {
            "backbone": backbone,
            "head": UnitBoxHead(*(shapes[name] for name in names), node.NUM_CLASSES),
            "head_in_features": names,
            "detect": _build_detect(cfg),
            "region": node.REGION,
            "box_loss": node.BOX_LOSS,
            "box_loss_weight": node.BOX_LOSS_WEIGHT,
            "confidence_loss_weight": node.CONFIDENCE_LOSS_WEIGHT,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "vis_period": cfg.VIS_PERIOD,
            "input_format": cfg.INPUT.FORMAT,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        # Files of torchvision hold a backbone alone: "features.0.weight" without "backbone.".
        for name in self.backbone.state_dict():
            if prefix + name in state_dict:
                state_dict[f"{prefix}backbone.{name}"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def forward(self, batched_inputs: list[dict]):
        """Losses by name while training; else one {"instances": Instances} an image."""
        images = normalized_images(
            batched_inputs, self.pixel_mean, self.pixel_std, self.backbone.size_divisibility
        )
        features = self.backbone(images.tensor)
        size = images.tensor.shape[-2:]
        logits, distances = self.head(*(features[name] for name in self.head_in_features), size)
        # What lies in the padding counts neither in the losses nor as a detection.
        maps = [
            (logits[i, :, :height, :width], distances[i, :, :height, :width])
            for i, (height, width) in enumerate(images.image_sizes)
        ]
        if self.training:
            if is_time_to_draw(self.vis_period):
                visualize_training(batched_inputs[0], self.detect(*maps[0]), self.input_format)
            losses = self.losses(maps, [x["instances"].to(self.device) for x in batched_inputs])
            # DistributedDataParallel waits for every parameter, also behind features not in use.
            losses["loss_box"] += 0 * sum(x.float().mean() for x in features.values())
            return losses
        results = [self.detect(*of_image) for of_image in maps]
        return postprocess(results, batched_inputs, images.image_sizes)

    def losses(
        self, maps: list[tuple[Tensor, Tensor]], gt_instances: list[Instances]
    ) -> dict[str, Tensor]:
        """Sigmoid cross-entropy over all pixels and classes, divided by the number of pixels, and
        the box loss over the positive pixels, divided by theirs.

        Both numbers are means over processes and at least 1. Without a positive pixel the box loss
        is 0, with gradients.

        Args:
            maps: of N images logits (K, H, W) and distances (4, H, W).
            gt_instances: N, with `gt_boxes` and `gt_classes` in 0..K - 1.
        """
        confidence_loss = box_loss = positives = 0
        for (logits, distances), truth in zip(maps, gt_instances):
            if (truth.gt_classes >= len(logits)).any():
                raise ValueError(
                    f"A ground truth has the class {truth.gt_classes.max()}, but "
                    f"MODEL.UNITBOX.NUM_CLASSES is {len(logits)}."
                )
            owner = assign_pixels(truth.gt_boxes.tensor, logits.shape[1:], self.region)
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
            box_loss += box_side_loss(boxes, boxes_of(origin, expected), self.box_loss).sum()
            positives += len(rows)

        pixels = sum(logits[0].numel() for logits, _ in maps)
        counts = torch.tensor([pixels, positives], dtype=torch.float32, device=self.device)
        pixels, positives = reduce_mean(counts).clamp(min=1)
        return {
            "loss_confidence": self.confidence_loss_weight * confidence_loss / pixels,
            "loss_box": self.box_loss_weight * box_loss / positives,
        }


def _build_detect(cfg) -> Callable[[Tensor, Tensor], Instances]:
    node = cfg.MODEL.UNITBOX
    if node.INFERENCE == "nms":
        return PixelNMS(
            score_threshold=node.SCORE_THRESH_TEST,
            topk=node.TOPK_CANDIDATES_TEST,
            nms_threshold=node.NMS_THRESH_TEST,
            max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
        )
    if node.INFERENCE == "ellipses":
        return EllipseFit(node.REGION_THRESH_TEST, cfg.TEST.DETECTIONS_PER_IMAGE)
    raise ValueError(
        f"MODEL.UNITBOX.INFERENCE is 'nms' or 'ellipses', but it is {node.INFERENCE!r}."
    )
