"""The R-CNN heads of a "C4" ResNet (He et al., arXiv 1512.03385, appendix A): boxes are pooled from
the single map of res4, and res5 runs once a box.

Shape letters: N images, R proposals, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import Res5ROIHeads
from detectron2.structures import Instances
from torch import Tensor, nn

from iou_d2.errors import InputError

from .any_pooler import PYRAMIDS, with_pooler
from .faster_rcnn import with_box_loss


@dataclass(frozen=True)
class MeanOfRes5:
    """(R, C, P, P) -> (R, C', 1, 1): res5, then the mean of its map, which the box head reads.

    No module, so that the parameters of `res5` are those of the heads alone.
    """

    res5: nn.Sequential

    @property
    def output_shape(self) -> ShapeSpec:
        return ShapeSpec(channels=self.res5[-1].out_channels, height=1, width=1)

    def __call__(self, pooled: Tensor) -> Tensor:
        return self.res5(pooled).mean(dim=(2, 3), keepdim=True)


@ROI_HEADS_REGISTRY.register()
class BoxLossRes5ROIHeads(Res5ROIHeads):
    """Res5ROIHeads with BoxLossOutputLayers and the poolers of AnyPooler, but for spatial pyramids.

    Parameters have Detectron2's names, and `regress` is as that of BoxLossROIHeads.
    """

    @classmethod
    def from_config(cls, cfg, input_shape):
        kind = cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE
        if kind in PYRAMIDS:
            raise InputError(
                f"MODEL.ROI_BOX_HEAD.POOLER_TYPE is {kind!r}, whose bins of several sizes make no "
                f"map, and res5 of {cls.__name__} needs one: set 'PrRoIPool' or 'ROIAlignV2'."
            )
        names = cfg.MODEL.ROI_HEADS.IN_FEATURES
        if len(names) != 1:
            raise InputError(
                f"MODEL.ROI_HEADS.IN_FEATURES is {list(names)}, but {cls.__name__} pools from one "
                "feature, such as ['res4']."
            )
        arguments = with_pooler(super().from_config, cfg, input_shape, "ROI_BOX_HEAD", "pooler")
        shape = MeanOfRes5(arguments["res5"]).output_shape
        predictor = with_box_loss(cfg, shape, arguments["box_predictor"])
        return {**arguments, "box_predictor": predictor}

    def forward(self, images, features: dict[str, Tensor], proposals, targets=None):
        """See Detectron2's ROIHeads."""
        if self.training:
            return super().forward(images, features, proposals, targets)
        detections = self._forward_box(features, proposals)
        return self.forward_with_given_boxes(features, detections), {}

    def regress(
        self, features: dict[str, Tensor], proposals: list[Instances]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """N boxes (R, 4 or 4K) and N class probabilities (R, K + 1) of the `proposal_boxes`."""
        levels = [features[name] for name in self.in_features]
        boxes = [x.proposal_boxes for x in proposals]
        of_boxes = self._shared_roi_transform(levels, boxes).mean(dim=(2, 3))
        predictions = self.box_predictor(of_boxes)
        return (
            self.box_predictor.predict_boxes(predictions, proposals),
            self.box_predictor.predict_probs(predictions, proposals),
        )

    def _forward_box(self, features: dict[str, Tensor], proposals: list[Instances]):
        boxes, probabilities = self.regress(features, proposals)
        return self.box_predictor.select(boxes, probabilities, [x.image_size for x in proposals])[0]
