"""RetinaNet with any loss of its boxes, and IoU-aware RetinaNet (Wu et al., arXiv 1912.05992).

The latter has one more 3x3 conv beside the box regression, which predicts for every anchor the IoU
of its decoded box with the ground truth. Detections are ranked by p^alpha * IoU^(1 - alpha).

Shape letters: N images, K classes, A anchors a cell, L levels, R the anchors of an image (HWA; of
all levels where it says so), P positive anchors of the batch. Boxes are XYXY in pixels of the
network input. `logits` are class scores before the sigmoid, `deltas` the (dx, dy, dw, dh) of
Box2BoxTransform, `iou_logits` predicted IoUs before the sigmoid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.retinanet import (
    RetinaNet,
    RetinaNetHead,
    permute_to_N_HWA_K,
)
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from iou_d2.ops.box_losses import box_regression_loss, check_kind
from iou_d2.ops.boxes import aligned_iou

from .dense import detections_of_image, postprocess, reduce_mean, select_candidates
from .visualize import is_time_to_draw, visualize_training


def confidence(probability: Tensor, iou: Tensor, alpha: float) -> Tensor:
    """p^alpha * IoU^(1 - alpha), elementwise. alpha = 1 returns p to the last bit."""
    return probability.pow(alpha) * iou.pow(1 - alpha)


def iou_prediction_loss(iou_logits: Tensor, target: Tensor, loss_type: str) -> Tensor:
    """Sum over positive anchors of the loss between predicted and true IoU.

    Args:
        iou_logits: (P,) predictions before the sigmoid.
        target: (P,) in [0, 1]. Its gradient is log((1 - p) / p) under "bce" (Eqn. 5).
        loss_type: "bce", "l1" or "l2"; the last two compare after the sigmoid.

    Returns:
        A scalar; 0, with gradients, where P is 0.
    """
    if loss_type == "bce":
        return F.binary_cross_entropy_with_logits(iou_logits, target, reduction="sum")
    if loss_type == "l1":
        return (iou_logits.sigmoid() - target).abs().sum()
    if loss_type == "l2":
        return (iou_logits.sigmoid() - target).square().sum()
    raise ValueError(f"The IoU loss type is 'bce', 'l1' or 'l2', not {loss_type!r}.")


@META_ARCH_REGISTRY.register()
class BoxLossRetinaNet(RetinaNet):
    """RetinaNet with the box loss that MODEL.RETINANET.BBOX_REG_LOSS_TYPE names."""

    @configurable
    def __init__(
        self,
        *,
        box_reg_loss_type: str = "smooth_l1",
        box_reg_loss_weight: float = 1.0,
        **kwargs,
    ):
        """
        Args:
            box_reg_loss_type: one of `box_losses.KINDS`.
            box_reg_loss_weight: factor of that loss.
            kwargs: those of Detectron2's RetinaNet.
        """
        # Detectron2 0.5 knows two types only. Its own term is always smooth L1, and replaced.
        super().__init__(**kwargs)
        check_kind(box_reg_loss_type, "MODEL.RETINANET.BBOX_REG_LOSS_TYPE")
        self.box_loss_type = box_reg_loss_type
        self.box_loss_weight = box_reg_loss_weight

    @classmethod
    def from_config(cls, cfg):
        arguments = super().from_config(cfg)
        arguments["box_reg_loss_weight"] = cfg.MODEL.RETINANET.BBOX_REG_LOSS_WEIGHT
        return arguments

    def losses(
        self,
        anchors: list[Boxes],
        logits: list[Tensor],
        gt_labels: list[Tensor],
        deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """{"loss_cls": ..., "loss_box_reg": ...}, both divided by Detectron2's running mean of the
        number of positive anchors. Arguments as in `IoUAwareRetinaNet.iou_loss`."""
        losses = super().losses(anchors, logits, gt_labels, deltas, gt_boxes)
        labels = torch.stack(gt_labels)  # (N, R)
        positive = (labels >= 0) & (labels != self.num_classes)
        loss = box_regression_loss(
            torch.cat(deltas, dim=1)[positive],
            Boxes.cat(anchors).tensor.expand(len(labels), -1, -1)[positive],
            torch.stack(gt_boxes)[positive],
            self.box2box_transform,
            self.box_loss_type,
            self.smooth_l1_beta,
        )
        losses["loss_box_reg"] = self.box_loss_weight * loss / self.loss_normalizer
        return losses


class IoUAwareRetinaNetHead(RetinaNetHead):
    """RetinaNetHead and the IoU conv, `iou_pred`, on the last feature of the box tower."""

    @configurable
    def __init__(self, *, num_anchors: int, conv_dims: list[int], **kwargs):
        super().__init__(num_anchors=num_anchors, conv_dims=conv_dims, **kwargs)
        self.iou_pred = nn.Conv2d(conv_dims[-1], num_anchors, kernel_size=3, padding=1)
        nn.init.normal_(self.iou_pred.weight, std=0.01)
        nn.init.zeros_(self.iou_pred.bias)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """L features (N, C, H, W) -> L class logits (N, AK, H, W), L deltas (N, 4A, H, W) and
        L IoU logits (N, A, H, W)."""
        logits, deltas, iou_logits = [], [], []
        for feature in features:
            box_feature = self.bbox_subnet(feature)
            logits.append(self.cls_score(self.cls_subnet(feature)))
            deltas.append(self.bbox_pred(box_feature))
            iou_logits.append(self.iou_pred(box_feature))
        return logits, deltas, iou_logits


@META_ARCH_REGISTRY.register()
class IoUAwareRetinaNet(BoxLossRetinaNet):
    """RetinaNet whose confidence knows how well a box fits.

    Only `label_anchors` and `losses` of Detectron2's RetinaNet are used, which mean the same in 0.5
    and in main. Detections carry `cls_scores` (p) and `pred_ious` beside `scores`.
    """

    @configurable
    def __init__(
        self,
        *,
        alpha: float = 0.5,
        iou_loss_type: str = "bce",
        iou_loss_weight: float = 1.0,
        iou_target_gradient: bool = True,
        **kwargs,
    ):
        """
        Args:
            alpha: weight of the class score in the confidence, in [0, 1].
            iou_loss_type: "bce", "l1" or "l2".
            iou_loss_weight: factor of the IoU loss.
            iou_target_gradient: let the gradient of the target reach the box branch.
            kwargs: those of BoxLossRetinaNet; `head` is an IoUAwareRetinaNetHead.
        """
        super().__init__(**kwargs)
        if not 0 <= alpha <= 1:
            raise ValueError(f"MODEL.IOU_RETINANET.ALPHA lies in [0, 1], but it is {alpha}.")
        if iou_loss_type not in ("bce", "l1", "l2"):
            raise ValueError(
                "MODEL.IOU_RETINANET.IOU_LOSS_TYPE is 'bce', 'l1' or 'l2', "
                f"but it is {iou_loss_type!r}."
            )
        self.alpha = alpha
        self.iou_loss_type = iou_loss_type
        self.iou_loss_weight = iou_loss_weight
        self.iou_target_gradient = iou_target_gradient

    @classmethod
    def from_config(cls, cfg):
        arguments = super().from_config(cfg)
        shapes = arguments["backbone"].output_shape()
        arguments["head"] = IoUAwareRetinaNetHead(
            cfg, [shapes[name] for name in cfg.MODEL.RETINANET.IN_FEATURES]
        )
        arguments["alpha"] = cfg.MODEL.IOU_RETINANET.ALPHA
        arguments["iou_loss_type"] = cfg.MODEL.IOU_RETINANET.IOU_LOSS_TYPE
        arguments["iou_loss_weight"] = cfg.MODEL.IOU_RETINANET.IOU_LOSS_WEIGHT
        arguments["iou_target_gradient"] = cfg.MODEL.IOU_RETINANET.IOU_TARGET_GRADIENT
        return arguments

    def forward(self, batched_inputs: list[dict]):
        """Losses by name while training; else one {"instances": Instances} an image."""
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        features = [features[name] for name in self.head_in_features]
        anchors = self.anchor_generator(features)
        logits, deltas, iou_logits = self.head(features)
        logits = [permute_to_N_HWA_K(x, self.num_classes) for x in logits]  # (N, R, K)
        deltas = [permute_to_N_HWA_K(x, 4) for x in deltas]  # (N, R, 4)
        iou_logits = [permute_to_N_HWA_K(x, 1).squeeze(2) for x in iou_logits]  # (N, R)

        if not self.training:
            results = self.detect(anchors, logits, deltas, iou_logits, images.image_sizes)
            return postprocess(results, batched_inputs, images.image_sizes)

        gt_instances = [x["instances"].to(self.device) for x in batched_inputs]
        gt_labels, gt_boxes = self.label_anchors(anchors, gt_instances)
        losses = self.losses(anchors, logits, gt_labels, deltas, gt_boxes)
        losses["loss_iou"] = self.iou_loss(anchors, gt_labels, gt_boxes, deltas, iou_logits)
        if is_time_to_draw(self.vis_period):
            with torch.no_grad():
                results = self.detect(anchors, logits, deltas, iou_logits, images.image_sizes)
            visualize_training(batched_inputs[0], results[0], self.input_format)
        return losses

    def iou_loss(
        self,
        anchors: list[Boxes],
        gt_labels: list[Tensor],
        gt_boxes: list[Tensor],
        deltas: list[Tensor],
        iou_logits: list[Tensor],
    ) -> Tensor:
        """IoU loss over the positive anchors, divided by their number.

        Args:
            anchors: L levels of R boxes.
            gt_labels: N tensors (R of all levels,): a class, K for background, -1 for neither.
            gt_boxes: N tensors (R of all levels, 4), the ground truth that each anchor matches.
            deltas, iou_logits: L levels of (N, R, 4) and (N, R).

        Returns:
            A scalar; without a positive anchor 0, with gradients. The number of positives is the
            mean over processes, at least 1.
        """
        labels = torch.stack(gt_labels)  # (N, R)
        positive = (labels >= 0) & (labels != self.num_classes)
        # Half precision cannot hold boxes of more than 2048 px to the pixel.
        deltas = torch.cat(deltas, dim=1)[positive].float()  # (P, 4)
        iou_logits = torch.cat(iou_logits, dim=1)[positive].float()  # (P,)
        all_anchors = Boxes.cat(anchors).tensor.expand(len(labels), -1, -1)
        boxes = self.box2box_transform.apply_deltas(deltas, all_anchors[positive])
        target = aligned_iou(boxes, torch.stack(gt_boxes)[positive])
        if not self.iou_target_gradient:
            target = target.detach()
        loss = iou_prediction_loss(iou_logits, target, self.iou_loss_type)
        return self.iou_loss_weight * loss / reduce_mean(positive.sum().float()).clamp(min=1)

    def detect(
        self,
        anchors: list[Boxes],
        logits: list[Tensor],
        deltas: list[Tensor],
        iou_logits: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """Detections of N images at the size of the network input, best first."""
        return [
            detections_of_image(
                [
                    self.candidates(level, *(x[i] for x in predictions), size)
                    for level, *predictions in zip(anchors, logits, deltas, iou_logits)
                ],
                self.test_nms_thresh,
                self.max_detections_per_image,
            )
            for i, size in enumerate(image_sizes)
        ]

    def candidates(
        self, anchors: Boxes, logits: Tensor, deltas: Tensor, iou_logits: Tensor, image_size
    ) -> Instances:
        """What one level, R anchors, of one image sends to NMS; confidence comes before top-k."""
        probability, iou = logits.sigmoid(), iou_logits.sigmoid()
        chosen = select_candidates(
            confidence(probability, iou[:, None], self.alpha),
            self.test_score_thresh,
            self.test_topk_candidates,
        )
        boxes = self.box2box_transform.apply_deltas(
            deltas[chosen.anchors], anchors.tensor[chosen.anchors]
        )
        return Instances(
            image_size,
            pred_boxes=Boxes(boxes),
            scores=chosen.scores,
            pred_classes=chosen.classes,
            cls_scores=probability[chosen.anchors, chosen.classes],
            pred_ious=iou[chosen.anchors],
        )
