"""What SSD (arXiv 1512.02325) and RefineDet (arXiv 1711.06897) share: which boxes learn an object,
hard negative mining, the losses, and the convolutions of their heads.

Shape letters: N images, K classes, L levels, R default boxes of all levels, G objects of an image,
P positive boxes of the batch. Boxes are XYXY in pixels of the network input. Class scores before
the softmax are `logits` (N, R, K + 1), where the background is the last, as Detectron2 has it and
not the first, as Caffe and torchvision do. `labels` (N, R) are classes, K for background, IGNORED
for what learns no class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch.retinanet import permute_to_N_HWA_K
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor, nn

from iou_d2.errors import InputError
from iou_d2.ops.box_losses import BoxDeltas, BoxLoss, build_box_loss

from .dense import reduce_mean

IGNORED = -1
# Of smooth L1 as the box loss, in units of the deltas.
SMOOTH_L1_BETA = 1.0
# An object that overlaps no box by more is learnt by none.
MIN_OVERLAP = 1e-6


@dataclass(frozen=True)
class MultiBoxMatcher:
    """Which object each box learns.

    First the pair of an object and a box with the highest IoU of all is matched, then that of the
    others, until every object that overlaps a free box has one. Then every other box learns the
    object that it overlaps most.

    Args:
        positive: from this IoU on.
        negative: a box is background below this IoU; in between it learns no class.
    """

    positive: float = 0.5
    negative: float = 0.5

    @torch.no_grad()
    def __call__(self, boxes: Tensor, gt_boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (R, 4) and objects (G, 4) -> for each box the index of its object, -1 without one,
        and whether it is background: both (R,). What is not finite overlaps nothing."""
        if not len(gt_boxes):
            none = torch.full((len(boxes),), -1, device=boxes.device)
            return none, none < 0
        iou = pairwise_iou(Boxes(gt_boxes), Boxes(boxes)).nan_to_num(0.0)  # (G, R)
        best, match = iou.max(dim=0)
        match = torch.where(best >= self.positive, match, -1)
        objects, chosen = bipartite_match(iou)
        match[chosen] = objects
        return match, (match < 0) & (best < self.negative)


def bipartite_match(iou: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of an object and a box, greedily by falling IoU (G, R): (M,) objects, (M,) boxes.

    An object that overlaps no box that is left by more than `MIN_OVERLAP` has none.
    """
    # One pair after the other: on a GPU each would wait for the one before.
    device, iou = iou.device, iou.cpu().clone()
    # Of each object the best free box; it is looked for again only when another one takes it.
    best, box = iou.max(dim=1)
    pairs = []
    for _ in range(min(iou.shape)):
        index = int(best.argmax())
        if not best[index] > MIN_OVERLAP:
            break
        taken = int(box[index])
        pairs.append((index, taken))
        iou[:, taken] = 0
        best[index] = 0
        (losers,) = torch.where((box == taken) & (best > 0))
        best[losers], box[losers] = iou[losers].max(dim=1)
    objects, boxes = torch.tensor(pairs, dtype=torch.int64, device=device).reshape(-1, 2).T
    return objects, boxes


def hard_negatives(loss: Tensor, eligible: Tensor, counts: Tensor) -> Tensor:
    """Of the `eligible` (N, R) entries of each row those with the highest `loss` (N, R), as many as
    `counts` (N,) says or as there are: a mask (N, R)."""
    order = loss.masked_fill(~eligible, -torch.inf).argsort(dim=1, descending=True)
    places = torch.arange(loss.shape[1], device=loss.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    return eligible & (rank < counts[:, None])


class Assignment(NamedTuple):
    """What the boxes of a batch learn."""

    labels: Tensor  # (N, R)
    gt_boxes: Tensor  # (N, R, 4), undefined where the label is no class

    def positive(self, num_classes: int) -> Tensor:
        """(N, R) whether a box learns an object."""
        return (self.labels != IGNORED) & (self.labels != num_classes)


class MultiBoxTerms(NamedTuple):
    """Sums over the batch, and what they are divided by."""

    cls: Tensor
    box: Tensor
    count: Tensor  # positive boxes: the mean over processes, at least 1
    positive: Tensor  # (N, R), which they are
    predicted: BoxDeltas  # P
    gt_boxes: Tensor  # (P, 4)


@dataclass(frozen=True)
class MultiBoxLoss:
    """The softmax cross-entropy of positive boxes and hard negatives, and the box loss of positive
    boxes.

    Args:
        matcher: which object a box learns.
        transform: between deltas and boxes.
        box_loss: of positive boxes.
        negatives: of the hardest negatives of an image so many a positive are kept.
        negatives_without_objects: of an image without a positive box so many.
    """

    matcher: MultiBoxMatcher
    transform: Box2BoxTransform
    box_loss: BoxLoss
    negatives: float = 3.0
    negatives_without_objects: int = 0

    @torch.no_grad()
    def assign(
        self, anchors: Tensor, gt_instances: Sequence[Instances], num_classes: int
    ) -> Assignment:
        """What anchors (N, R, 4) learn.

        Raises:
            ValueError: a ground truth has a class beyond 0..num_classes - 1.
        """
        labels, gt_boxes = [], []
        for boxes, truth in zip(anchors, gt_instances):
            _require_classes(truth.gt_classes, num_classes)
            match, is_background = self.matcher(boxes, truth.gt_boxes.tensor)
            label = torch.where(is_background, num_classes, IGNORED)
            target = torch.zeros_like(boxes)
            positive = match >= 0
            label[positive] = truth.gt_classes[match[positive]]
            target[positive] = truth.gt_boxes.tensor[match[positive]].to(target)
            labels.append(label)
            gt_boxes.append(target)
        return Assignment(torch.stack(labels), torch.stack(gt_boxes))

    def __call__(
        self, anchors: Tensor, logits: Tensor, deltas: Tensor, assignment: Assignment
    ) -> MultiBoxTerms:
        """Of anchors (N, R, 4), logits (N, R, K + 1) and deltas (N, R, 4); all sums have gradients
        to them, 0 where nothing is learnt."""
        labels, num_classes = assignment.labels, logits.shape[-1] - 1
        positive = assignment.positive(num_classes)
        entropy = F.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        ).view_as(labels)
        learning = positive | self._mine(entropy.detach(), labels == num_classes, positive)
        predicted = BoxDeltas(deltas[positive], anchors[positive], self.transform)
        gt_boxes = assignment.gt_boxes[positive]
        return MultiBoxTerms(
            cls=entropy[learning].sum(),
            box=self.box_loss.of_deltas(predicted, gt_boxes),
            count=reduce_mean(positive.sum().float()).clamp(min=1),
            positive=positive,
            predicted=predicted,
            gt_boxes=gt_boxes,
        )

    def _mine(self, loss: Tensor, eligible: Tensor, positive: Tensor) -> Tensor:
        positives = positive.sum(dim=1)
        counts = torch.where(
            positives > 0,
            (self.negatives * positives).floor(),
            float(self.negatives_without_objects),
        )
        return hard_negatives(loss, eligible, counts)


def _require_classes(classes: Tensor, num_classes: int) -> None:
    if (classes >= num_classes).any():
        raise ValueError(
            f"A ground truth has the class {classes.max()}, but MODEL.RETINANET.NUM_CLASSES is "
            f"{num_classes}."
        )


def build_multibox_loss(cfg, matcher: MultiBoxMatcher) -> MultiBoxLoss:
    """The loss that MODEL.MULTIBOX describes."""
    node, key = cfg.MODEL.MULTIBOX, "MODEL.MULTIBOX"
    return MultiBoxLoss(
        matcher=matcher,
        transform=Box2BoxTransform(weights=tuple(node.BBOX_REG_WEIGHTS)),
        box_loss=build_box_loss(
            node.BOX_LOSS, SMOOTH_L1_BETA, f"{key}.BOX_LOSS", cfg.MODEL.INVERTED_BOXES
        ),
        negatives=node.NEGATIVES_PER_POSITIVE,
        negatives_without_objects=node.NEGATIVES_WITHOUT_OBJECTS,
    )


def build_matcher(thresholds: Sequence[float], key: str) -> MultiBoxMatcher:
    """The matcher of `thresholds`, [negative, positive], which the config `key` gives."""
    if len(thresholds) != 2 or not 0 < thresholds[0] <= thresholds[1] <= 1:
        raise InputError(
            f"{key} is two rising IoUs, below which a box is background and from which on it "
            f"learns an object, but it is {list(thresholds)}."
        )
    return MultiBoxMatcher(positive=thresholds[1], negative=thresholds[0])


class LevelConvs(nn.ModuleList):
    """A 3x3 convolution for each level, whose values are those of the boxes of a cell."""

    def __init__(self, shapes: Sequence[ShapeSpec], num_cell_boxes: Sequence[int], values: int):
        """`values`: how many numbers each box has."""
        super().__init__(
            nn.Conv2d(shape.channels, boxes * values, kernel_size=3, padding=1)
            for shape, boxes in zip(shapes, num_cell_boxes)
        )
        self.values = values
        for conv in self:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """L features (N, C, H, W) -> (N, R, values), box by box of a cell."""
        levels = [
            permute_to_N_HWA_K(conv(feature), self.values) for conv, feature in zip(self, features)
        ]
        return torch.cat(levels, dim=1)


def shapes_of(cfg, available: dict[str, ShapeSpec]) -> list[ShapeSpec]:
    """The shapes of the features MODEL.RETINANET.IN_FEATURES, which the backbone must have."""
    names = cfg.MODEL.RETINANET.IN_FEATURES
    missing = [name for name in names if name not in available]
    if missing or not names:
        raise InputError(
            f"MODEL.RETINANET.IN_FEATURES is {list(names)}, but the backbone "
            f"{cfg.MODEL.BACKBONE.NAME} puts out {', '.join(available)}."
        )
    return [available[name] for name in names]
