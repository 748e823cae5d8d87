"""Faster R-CNN and Cascade R-CNN with any of the box losses of ops/box_losses.py, and any pooler.

Detectron2 0.5 has smooth L1 and GIoU, main DIoU and CIoU too. Names of parameters, initial weights
and normalisers are Detectron2's. What else the heads take is for weights of torchvision and
mmdetection.

Shape letters: N images, R proposals of the batch or anchors of an image (HWA; of all levels where
it says so), K classes, L levels. `deltas` are the (dx, dy, dw, dh) of Box2BoxTransform.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN
from detectron2.modeling.roi_heads import (
    ROI_HEADS_REGISTRY,
    CascadeROIHeads,
    FastRCNNOutputLayers,
    StandardROIHeads,
)
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor

from iou_d2.ops.box_losses import BoxDeltas, BoxLoss, build_box_loss

from .any_pooler import AnyPooler
from .dense import part_named


@PROPOSAL_GENERATOR_REGISTRY.register()
class BoxLossRPN(RPN):
    """RPN whose box loss is a part: the one that MODEL.RPN.BBOX_REG_LOSS_TYPE names."""

    @configurable
    def __init__(self, *, box_loss: BoxLoss, **kwargs):
        """
        Args:
            box_loss: of the deltas of anchors that match an object.
            kwargs: those of Detectron2's RPN.
        """
        super().__init__(**kwargs)
        self.box_loss = box_loss

    @classmethod
    def from_config(cls, cfg, input_shape):
        arguments = super().from_config(cfg, input_shape)
        arguments["min_box_size"] = max(arguments["min_box_size"], cfg.MODEL.RPN.MIN_SIZE)
        return _with_box_loss_part(arguments, cfg, "MODEL.RPN.BBOX_REG_LOSS_TYPE")

    def losses(
        self,
        anchors: list[Boxes],
        logits: list[Tensor],
        gt_labels: list[Tensor],
        deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """{"loss_rpn_cls": ..., "loss_rpn_loc": ...}, divided by the number of sampled anchors.

        Args:
            anchors: L levels of R boxes.
            logits, deltas: L levels of (N, R) and (N, R, 4).
            gt_labels: N tensors (R of all levels,): 1 object, 0 background, -1 not sampled.
            gt_boxes: N tensors (R of all levels, 4), the ground truth that each anchor matches.
        """
        labels = torch.stack(gt_labels)  # (N, R)
        positive, sampled = labels == 1, labels >= 0
        storage = get_event_storage()
        for name, mask in (("pos", positive), ("neg", labels == 0)):
            storage.put_scalar(f"rpn/num_{name}_anchors", mask.sum().item() / len(labels))
        class_loss = F.binary_cross_entropy_with_logits(
            torch.cat(logits, dim=1)[sampled], labels[sampled].float(), reduction="sum"
        )
        predicted = BoxDeltas(
            torch.cat(deltas, dim=1)[positive],
            Boxes.cat(anchors).tensor.expand(len(labels), -1, -1)[positive],
            self.box2box_transform,
        )
        box_loss = self.box_loss.of_deltas(predicted, torch.stack(gt_boxes)[positive])
        count = self.batch_size_per_image * len(labels)
        losses = {"loss_rpn_cls": class_loss / count, "loss_rpn_loc": box_loss / count}
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}


class BoxLossOutputLayers(FastRCNNOutputLayers):
    """FastRCNNOutputLayers whose box loss is a part: the one that
    MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE names."""

    @configurable
    def __init__(self, input_shape, *, box_loss: BoxLoss, min_size_test: float = 0.0, **kwargs):
        """
        Args:
            input_shape: ShapeSpec of the features, or their number of channels.
            box_loss: of the deltas of proposals that match an object.
            min_size_test: sides of a detected box are at least that, in pixels of the network
                input, after clipping.
            kwargs: those of Detectron2's class.
        """
        super().__init__(input_shape, **kwargs)
        self.box_loss = box_loss
        self.min_size_test = min_size_test

    @classmethod
    def from_config(cls, cfg, input_shape):
        arguments = super().from_config(cfg, input_shape)
        arguments = _with_box_loss_part(arguments, cfg, "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE")
        return {**arguments, "min_size_test": cfg.MODEL.ROI_HEADS.MIN_SIZE_TEST}

    def box_reg_loss(
        self, proposal_boxes: Tensor, gt_boxes: Tensor, pred_deltas: Tensor, gt_classes: Tensor
    ) -> Tensor:
        """Loss of the proposals that match an object, divided by the number R of all of them.

        Args:
            proposal_boxes, gt_boxes: (R, 4).
            pred_deltas: (R, 4) or (R, 4K).
            gt_classes: (R,), K for background.

        Returns:
            A scalar; without an object 0, with gradients.
        """
        objects = torch.nonzero((gt_classes >= 0) & (gt_classes < self.num_classes)).squeeze(1)
        deltas = pred_deltas[objects].reshape(len(objects), pred_deltas.shape[1] // 4, 4)
        columns = gt_classes[objects].clamp(max=deltas.shape[1] - 1)  # all 0 for (R, 4)
        predicted = BoxDeltas(
            deltas[torch.arange(len(objects), device=objects.device), columns],
            proposal_boxes[objects],
            self.box2box_transform,
        )
        return self.box_loss.of_deltas(predicted, gt_boxes[objects]) / max(len(gt_classes), 1)

    def inference(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> tuple[list[Instances], list[Tensor]]:
        """The detections of N images, and which proposals they come from."""
        boxes = self.predict_boxes(predictions, proposals)
        probabilities = self.predict_probs(predictions, proposals)
        return self.select(boxes, probabilities, [x.image_size for x in proposals])

    def select(
        self,
        boxes: Sequence[Tensor],
        probabilities: Sequence[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> tuple[list[Instances], list[Tensor]]:
        """As `inference`, from N boxes (R, 4 or 4K) and class probabilities (R, K + 1)."""
        if self.min_size_test > 0:
            probabilities = [
                _without_small(*of_image, self.min_size_test)
                for of_image in zip(boxes, probabilities, image_sizes)
            ]
        return fast_rcnn_inference(
            list(boxes),
            list(probabilities),
            image_sizes,
            self.test_score_thresh,
            self.test_nms_thresh,
            self.test_topk_per_image,
        )


def _without_small(
    boxes: Tensor, probabilities: Tensor, image_size: tuple[int, int], min_size: float
) -> Tensor:
    """`probabilities` (R, K + 1), with 0 where a box (R, 4 or 4K) has a side under `min_size`."""
    clipped = Boxes(boxes.detach().reshape(-1, 4).clone())
    clipped.clip(image_size)
    sides = clipped.tensor[:, 2:] - clipped.tensor[:, :2]
    large = (sides >= min_size).all(dim=1).view(len(boxes), boxes.shape[1] // 4)  # (R, 1 or K)
    return torch.cat([probabilities[:, :-1] * large, probabilities[:, -1:]], dim=1)


@ROI_HEADS_REGISTRY.register()
class BoxLossROIHeads(AnyPooler, StandardROIHeads):
    """StandardROIHeads with BoxLossOutputLayers and any pooler."""

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        parts = super()._init_box_head(cfg, input_shape)
        shape = parts["box_head"].output_shape
        parts["box_predictor"] = with_box_loss(cfg, shape, parts["box_predictor"])
        return parts

    def regress(
        self, features: dict[str, Tensor], proposals: list[Instances]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """N boxes (R, 4 or 4K) and N class probabilities (R, K + 1) of the `proposal_boxes`."""
        levels = [features[name] for name in self.box_in_features]
        pooled = self.box_pooler(levels, [x.proposal_boxes for x in proposals])
        predictions = self.box_predictor(self.box_head(pooled))
        return (
            self.box_predictor.predict_boxes(predictions, proposals),
            self.box_predictor.predict_probs(predictions, proposals),
        )


class Stage(NamedTuple):
    """What a stage of a cascade says of N proposals."""

    predictor: FastRCNNOutputLayers
    predictions: tuple[Tensor, Tensor]  # logits (R, K + 1), deltas (R, 4)
    proposals: list[Instances]


# All stages -> N class probabilities (R, K + 1).
ScoreMean = Callable[[Sequence[Stage]], Sequence[Tensor]]


def mean_of_probabilities(stages: Sequence[Stage]) -> Sequence[Tensor]:
    """Detectron2, and the authors of Cascade R-CNN."""
    probabilities = [x.predictor.predict_probs(x.predictions, x.proposals) for x in stages]
    return [sum(of_image) * (1.0 / len(stages)) for of_image in zip(*probabilities)]


def probabilities_of_mean(stages: Sequence[Stage]) -> Sequence[Tensor]:
    """mmdetection."""
    logits = sum(stage.predictions[0] for stage in stages) / len(stages)
    last = stages[-1]
    return last.predictor.predict_probs((logits, last.predictions[1]), last.proposals)


SCORE_MEANS = {"probabilities": mean_of_probabilities, "logits": probabilities_of_mean}


@ROI_HEADS_REGISTRY.register()
class BoxLossCascadeROIHeads(AnyPooler, CascadeROIHeads):
    """CascadeROIHeads with BoxLossOutputLayers and any pooler."""

    @configurable
    def __init__(self, *, score_mean: ScoreMean = mean_of_probabilities, **kwargs):
        """
        Args:
            score_mean: how the class scores of the stages become one.
            kwargs: those of Detectron2's class.
        """
        super().__init__(**kwargs)
        self.score_mean = score_mean

    @classmethod
    def from_config(cls, cfg, input_shape):
        key = "MODEL.ROI_BOX_CASCADE_HEAD.SCORE_MEAN"
        mean = part_named(SCORE_MEANS, cfg.MODEL.ROI_BOX_CASCADE_HEAD.SCORE_MEAN, key)
        return {**super().from_config(cfg, input_shape), "score_mean": mean}

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        parts = super()._init_box_head(cfg, input_shape)
        stages = zip(parts["box_heads"], parts["box_predictors"])
        parts["box_predictors"] = [
            with_box_loss(cfg, head.output_shape, predictor) for head, predictor in stages
        ]
        return parts

    def regress(
        self, features: dict[str, Tensor], proposals: list[Instances]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """N boxes (R, 4) of the last stage, and N class probabilities (R, K + 1) of all."""
        levels = [features[name] for name in self.box_in_features]
        image_sizes = [x.image_size for x in proposals]
        boxes, stages = [], []
        for index, predictor in enumerate(self.box_predictor):
            if index > 0:
                proposals = self._create_proposals_from_boxes(boxes, image_sizes)
            predictions = self._run_stage(levels, proposals, index)
            boxes = predictor.predict_boxes(predictions, proposals)
            stages.append(Stage(predictor, predictions, proposals))
        return boxes, self.score_mean(stages)

    def _forward_box(self, features: dict[str, Tensor], proposals: list[Instances], targets=None):
        if self.training:
            return super()._forward_box(features, proposals, targets)
        boxes, probabilities = self.regress(features, proposals)
        image_sizes = [x.image_size for x in proposals]
        return self.box_predictor[-1].select(boxes, probabilities, image_sizes)[0]


def with_box_loss(
    cfg, input_shape: ShapeSpec, predictor: FastRCNNOutputLayers
) -> BoxLossOutputLayers:
    """BoxLossOutputLayers with the weights and the transform of `predictor`."""
    # Draws no random numbers, so that a seed gives the weights that it gives to Detectron2's heads.
    with torch.random.fork_rng(devices=[]):
        layers = BoxLossOutputLayers(
            cfg, input_shape, box2box_transform=predictor.box2box_transform
        )
    layers.load_state_dict(predictor.state_dict())
    return layers


def _with_box_loss_part(arguments: dict, cfg, key: str) -> dict:
    """Detectron2's arguments with the part in place of its own loss, of which 0.5 knows two types
    only."""
    kind, beta = arguments.pop("box_reg_loss_type"), arguments.pop("smooth_l1_beta")
    return {**arguments, "box_loss": build_box_loss(kind, beta, key, cfg.MODEL.INVERTED_BOXES)}
