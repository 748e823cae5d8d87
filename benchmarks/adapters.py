"""Detectors of other libraries as modules that take and answer what the benchmarks hand to ours."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from iou_d2.engine.convert import translate_tensors


class TorchvisionDetector(nn.Module):
    """A detector of torchvision that takes a batch from `torchvision_batch`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Sequence[dict]) -> dict[str, Tensor] | list[dict]:
        """Losses by name while training, else torchvision's detections."""
        images = [x["image"] for x in batch]
        return self.model(images, [x["target"] for x in batch] if self.training else None)


def torchvision_batch(batch: Sequence[dict]) -> list[dict]:
    """Detectron2's input as torchvision has it: RGB in [0, 1], and labels from 1 on."""
    converted = []
    for entry in batch:
        truth = entry["instances"]
        target = {"boxes": truth.gt_boxes.tensor, "labels": truth.gt_classes + 1}
        if truth.has("gt_masks"):
            target["masks"] = truth.gt_masks.tensor.to(torch.uint8)
        converted.append({"image": entry["image"] / 255, "target": target})
    return converted


def copy_weights(peer: nn.Module, layout: str, ours: nn.Module) -> None:
    """Give our model the weights of `peer`, so that both detect alike.

    Args:
        layout: of the names of `peer`'s parameters, such as "torchvision".

    Raises RuntimeError where a parameter of ours is left.
    """
    tensors = translate_tensors(peer.state_dict(), layout, "detectron2").tensors
    own = ours.state_dict()
    ours.load_state_dict({**{k: v for k, v in own.items() if "anchor" in k}, **tensors})
