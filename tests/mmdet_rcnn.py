"""State dicts of mmdetection's R-CNNs with few channels and random weights; names by hand."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.resnet import Bottleneck

from torchvision_rcnn import CHANNELS, CLASSES, FC, ThinResNet

MASK_CHANNELS = 16


def mmdet_rcnn_state(cascade: bool, mask: bool, iou: bool = False) -> dict[str, Tensor]:
    """Of R-50, of Faster, Mask, Cascade or Cascade Mask R-CNN, or of IoU-Net (`iou`)."""
    shapes = {}

    def layer(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    for name, x in ThinResNet(Bottleneck, (3, 4, 6, 3)).state_dict().items():
        if not name.startswith("fc."):
            shapes[f"backbone.{name}"] = tuple(x.shape)
    for index, channels in enumerate((32, 64, 128, 256)):
        layer(f"neck.lateral_convs.{index}.conv", CHANNELS, channels, 1, 1)
        layer(f"neck.fpn_convs.{index}.conv", CHANNELS, CHANNELS, 3, 3)
    layer("rpn_head.rpn_conv", CHANNELS, CHANNELS, 3, 3)
    layer("rpn_head.rpn_cls", 3, CHANNELS, 1, 1)
    layer("rpn_head.rpn_reg", 12, CHANNELS, 1, 1)
    for stage in (".0", ".1", ".2") if cascade else ("",):
        head = f"roi_head.bbox_head{stage}"
        layer(f"{head}.shared_fcs.0", FC, CHANNELS * 49)
        layer(f"{head}.shared_fcs.1", FC, FC)
        layer(f"{head}.fc_cls", CLASSES + 1, FC)
        layer(f"{head}.fc_reg", 4 if cascade else 4 * CLASSES, FC)
        if mask:
            head = f"roi_head.mask_head{stage}"
            for index in range(4):
                channels = MASK_CHANNELS if index else CHANNELS
                layer(f"{head}.convs.{index}.conv", MASK_CHANNELS, channels, 3, 3)
            layer(f"{head}.upsample", MASK_CHANNELS, MASK_CHANNELS, 2, 2)
            layer(f"{head}.conv_logits", CLASSES, MASK_CHANNELS, 1, 1)
    if iou:
        layer("roi_head.iou_head.shared_fcs.0", FC, CHANNELS * 49)
        layer("roi_head.iou_head.shared_fcs.1", FC, FC)
        layer("roi_head.iou_head.fc_iou", CLASSES, FC)
    return random_weights(shapes)


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """As torchvision_rcnn.randomize."""
    generator = torch.Generator().manual_seed(0)
    gains = {"neck": 0.4, "fc_cls": 3.0, "rpn_reg": 0.2, "fc_iou": 0.2}
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif len(shape) > 1:
            gain = next((gain for part, gain in gains.items() if part in name), 1.4)
            state[name] = gain * noise / noise[0].numel() ** 0.5
        elif name.endswith(("running_var", ".weight")):
            state[name] = (1 + 0.1 * noise) * (0.3 if "bn3.weight" in name else 1)
        else:
            state[name] = 0.1 * noise
    return state
