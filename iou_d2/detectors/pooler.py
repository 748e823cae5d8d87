"""Detectron2's ROIPooler with other layers: precise RoI pooling, the maximum, spatial pyramids.

Letters: N images, M boxes of all images, C channels, L levels of the feature pyramid, P x Q bins, B
    bins of all levels of a spatial pyramid; boxes XYXY in pixels of the network input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from detectron2.modeling.poolers import (
    ROIPooler,
    assign_boxes_to_levels,
    convert_boxes_to_pooler_format,
)
from detectron2.structures import Boxes
from torch import nn

from iou_d2.layers import PrRoIPool
from iou_d2.layers.spp import SpatialPyramidPool


class LayerPooler(ROIPooler):
    """A ROIPooler that pools each level of the feature pyramid with a layer that it is given.

    ``scales``, ``canonical_box_size`` and ``canonical_level`` are those of ROIPooler.
    """

    def __init__(
        self,
        layer: Callable[[float], nn.Module],
        output_size: int | tuple[int, int],
        scales: Sequence[float],
        canonical_box_size: int = 224,
        canonical_level: int = 4,
    ):
        """
        Args:
            layer: scale -> (N, C, H, W), (M, 5) -> (M, C, P, Q).
            output_size: (P, Q), or one number for both.
        """
        super().__init__(
            output_size,
            scales,
            sampling_ratio=0,
            pooler_type="ROIAlignV2",
            canonical_box_size=canonical_box_size,
            canonical_level=canonical_level,
        )
        self.level_poolers = nn.ModuleList(layer(scale) for scale in scales)

    def assign_levels(self, box_lists: list[Boxes]) -> torch.Tensor:
        """(M,) int64: each box's level in [0, L) by its area (FPN, eq. 1); 0 for one with NaN."""
        if len(self.level_poolers) == 1:
            count = sum(len(boxes) for boxes in box_lists)
            return torch.zeros(count, dtype=torch.int64, device=box_lists[0].device)
        range_ = self.min_level, self.max_level
        levels = assign_boxes_to_levels(
            box_lists, *range_, self.canonical_box_size, self.canonical_level
        )
        return levels.clamp(0, len(self.level_poolers) - 1)

    def forward(
        self,
        x: list[torch.Tensor],
        box_lists: list[Boxes],
        levels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Pools every box from one level.

        Args:
            x: L feature maps, (N, C, H_l, W_l).
            box_lists: the boxes of each of the N images.
            levels: (M,) int64, the level of every box, to keep it while coordinates move, as
                refinement must; default: :meth:`assign_levels`.

        Returns:
            (M, C, P, Q); no boxes give an empty result that still depends on the maps.

        Raises:
            ValueError: when the number of maps, images or levels does not fit.
        """
        if len(x) != len(self.level_poolers):
            raise ValueError(f"The pooler has {len(self.level_poolers)} levels, got {len(x)} maps.")
        if len(box_lists) != len(x[0]):
            raise ValueError(f"There are {len(x[0])} images and boxes for {len(box_lists)}.")
        if not box_lists:
            return x[0].new_zeros(0, x[0].shape[1], *self.output_size)
        rois = convert_boxes_to_pooler_format(box_lists)
        if levels is None:
            levels = self.assign_levels(box_lists)
        elif levels.shape != rois.shape[:1]:
            raise ValueError(f"There are {len(rois)} boxes and levels of shape {levels.shape}.")
        if len(x) == 1:
            return self.level_poolers[0](x[0], rois)
        if torch.jit.is_tracing():
            return self._traced(x, rois, levels)
        order = levels.argsort(stable=True)
        # All that a GPU is waited for; `bincount` would wait twice more.
        of_level = levels[:, None] == torch.arange(len(x), device=levels.device)
        counts = of_level.sum(dim=0).tolist()
        parts = rois[order].split(counts)
        # A level without boxes has its part only in gradients.
        used = [i for i, f in enumerate(x) if counts[i] or f.requires_grad] or [0]
        return _in_order([self.level_poolers[i](x[i], parts[i]) for i in used], order)

    def _traced(
        self, x: list[torch.Tensor], rois: torch.Tensor, levels: torch.Tensor
    ) -> torch.Tensor:
        """The same where counts would become constants of the trace."""
        order = [torch.nonzero(levels == level).squeeze(1) for level in range(len(x))]
        pooled = [pool(f, rois[i]) for pool, f, i in zip(self.level_poolers, x, order)]
        return torch.cat(pooled)[torch.argsort(torch.cat(order))]


def _in_order(pooled: list[torch.Tensor], index: torch.Tensor) -> torch.Tensor:
    """What was pooled from each level, at its `index` (M,) among all; copied only where it must be,
    for the copies of a thousand boxes take half as long as pooling them on a CPU. On a GPU it would
    take longer to ask whether they must."""
    filled = [x for x in pooled if len(x)]
    if len(filled) == 1 and not any(x.requires_grad for x in pooled if not len(x)):
        return filled[0]
    whole = torch.cat(pooled)
    is_rising = index.device.type == "cpu" and (index[1:] > index[:-1]).all()
    return whole if is_rising else whole[torch.argsort(index)]


class PrRoIPooler(LayerPooler):
    """A ROIPooler whose level poolers are PrRoIPool, so that gradients reach the boxes.

    ``output_size``, ``scales``, ``canonical_box_size`` and ``canonical_level`` are those of
    ROIPooler. ``aligned`` moves boxes by half a feature pixel, as ROIAlignV2 does; without it
    levels of different stride disagree about where a box is. There is no ``sampling_ratio``: the
    mean over a bin is exact.
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        scales: Sequence[float],
        canonical_box_size: int = 224,
        canonical_level: int = 4,
        aligned: bool = True,
    ):
        super().__init__(
            lambda scale: PrRoIPool(self.output_size, scale, aligned),
            *(output_size, scales, canonical_box_size, canonical_level),
        )


class SPPPooler(LayerPooler):
    """Spatial pyramid pooling: see SpatialPyramidPool. (M, C, B, 1), so that it goes to fully
    connected heads alone."""

    def __init__(
        self,
        layer: Callable[[int, float], nn.Module],
        levels: Sequence[int],
        scales: Sequence[float],
        canonical_box_size: int = 224,
        canonical_level: int = 4,
    ):
        """
        Args:
            layer: bins a side and scale -> (N, C, H, W), (M, 5) -> (M, C, P, P).
            levels: bins a side of each level of the spatial pyramid.
        """
        super().__init__(
            lambda scale: SpatialPyramidPool(levels, lambda side: layer(side, scale)),
            (sum(side * side for side in levels), 1),
            *(scales, canonical_box_size, canonical_level),
        )


def has_box_gradients(pooler: ROIPooler) -> bool:
    """Whether gradients reach the boxes, as refinement needs: only precise RoI pooling has them."""
    layers = [layer for layer in pooler.level_poolers.modules() if not list(layer.children())]
    return all(isinstance(layer, PrRoIPool) for layer in layers)


def use_prroi_pool(model: nn.Module, aligned: bool = True) -> nn.Module:
    """Replaces every ROIPooler in a built model by a PrRoIPooler of the same size and levels, in
    place; those that pool precisely already stay.

    Works for the box, mask and keypoint branches of StandardROIHeads, CascadeROIHeads and their
    subclasses: poolers have no parameters, so that checkpoints fit before and after.

    Returns:
        The model itself.

    Raises:
        ValueError: if there is no ROIPooler in the model, or one of spatial pyramids of maxima.
    """
    replaced = 0
    for module in list(model.modules()):
        for name, child in module.named_children():
            if not isinstance(child, ROIPooler):
                continue
            replaced += 1
            if not has_box_gradients(child):
                setattr(module, name, from_roi_pooler(child, aligned))
    if replaced == 0:
        raise ValueError(f"{type(model).__name__} has no ROIPooler to replace.")
    return model


def from_roi_pooler(pooler: ROIPooler, aligned: bool = True) -> PrRoIPooler:
    """A PrRoIPooler with the output size, scales and level assignment of `pooler`.

    Raises ValueError for an SPPPooler, whose bins do not make a map."""
    if isinstance(pooler, SPPPooler):
        raise ValueError("An SPPPooler has no output size that a PrRoIPooler could have.")
    return PrRoIPooler(
        pooler.output_size,
        scales_of(pooler),
        pooler.canonical_box_size,
        pooler.canonical_level,
        aligned,
    )


def scales_of(pooler: ROIPooler) -> list[float]:
    """Feature pixels an input pixel of each level, but for an SPPPooler."""
    return [level.spatial_scale for level in pooler.level_poolers]
