"""torchvision's Faster and Mask R-CNN with few channels, else as they are published."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import (
    FastRCNNConvFCHead,
    FastRCNNPredictor,
    TwoMLPHead,
    _default_anchorgen,
)
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.misc import FrozenBatchNorm2d

CLASSES, CHANNELS, FC = 5, 32, 64
# The same sizes for a config.
THIN = (
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.ROI_HEADS.NUM_CLASSES", str(CLASSES)),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "32", "MODEL.RESNETS.WIDTH_PER_GROUP", "8"),
    *("MODEL.FPN.OUT_CHANNELS", str(CHANNELS), "MODEL.ROI_BOX_HEAD.FC_DIM", str(FC)),
    *("MODEL.ROI_BOX_HEAD.CONV_DIM", "16", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16"),
)


class ThinResNet(ResNet):
    """torchvision's ResNet with an eighth of the channels behind the stem."""

    def _make_layer(self, block, planes, *args, **kwargs):
        return super()._make_layer(block, planes // 8, *args, **kwargs)


def build_torchvision_rcnn(
    version: int, mask: bool, images: list[Tensor], eps: float = 0.0, **settings
) -> FasterRCNN:
    """`fasterrcnn_resnet50_fpn` or `maskrcnn_resnet50_fpn` or their _v2, thin, with random weights
    that find boxes of all classes in `images`, which it does not resize. `eps` is that of frozen
    batch norm; `settings` are FasterRCNN's."""
    norm = FrozenBatchNorm2d if version == 1 else nn.BatchNorm2d
    resnet = ThinResNet(Bottleneck, (3, 4, 6, 3), norm_layer=norm)
    backbone = BackboneWithFPN(
        resnet,
        {f"layer{i}": str(i - 1) for i in (1, 2, 3, 4)},
        [32, 64, 128, 256],
        CHANNELS,
        extra_blocks=LastLevelMaxPool(),
        norm_layer=None if version == 1 else nn.BatchNorm2d,
    )
    anchors = _default_anchorgen()
    head_norm = None if version == 1 else nn.BatchNorm2d
    parts = {
        "rpn_anchor_generator": anchors,
        "rpn_head": RPNHead(CHANNELS, 3, conv_depth=version),
        "box_head": TwoMLPHead(CHANNELS * 49, FC)
        if version == 1
        else FastRCNNConvFCHead((CHANNELS, 7, 7), [16] * 4, [FC], norm_layer=nn.BatchNorm2d),
        "box_predictor": FastRCNNPredictor(FC, CLASSES + 1),
    }
    if mask:
        parts["mask_head"] = MaskRCNNHeads(CHANNELS, [16] * 4, 1, norm_layer=head_norm)
        parts["mask_predictor"] = MaskRCNNPredictor(16, 16, CLASSES + 1)
    model = (MaskRCNN if mask else FasterRCNN)(backbone, **parts, **settings)
    model.transform.resize = lambda image, target: (image, target)
    overwrite_eps(model, eps)
    centre_scores(randomize(model).eval(), images)
    return model


@torch.no_grad()
def centre_scores(model: FasterRCNN, images: list[Tensor]) -> None:
    """Move the bias of the class scores, so that no class wins everywhere."""
    layer, logits = model.roi_heads.box_predictor.cls_score, []
    hook = layer.register_forward_hook(lambda *x: logits.append(x[-1]))
    model(images)
    hook.remove()
    layer.bias -= torch.cat(logits).mean(dim=0)


@torch.no_grad()
def randomize(model: nn.Module) -> nn.Module:
    """Weights that keep the scale of what goes through, statistics of norms off their defaults."""
    generator = torch.Generator().manual_seed(0)
    gains = {"fpn": 0.4, "cls_score": 3.0, "rpn.head.bbox_pred": 0.2}
    for name, x in model.state_dict().items():
        if not x.is_floating_point():
            continue
        noise = torch.randn(x.shape, generator=generator)
        if x.ndim > 1:
            gain = next((gain for part, gain in gains.items() if part in name), 1.4)
            x.copy_(gain * noise / x[0].numel() ** 0.5)
        elif name.endswith(("running_var", ".weight")):
            x.copy_(1 + 0.1 * noise)
        else:
            x.copy_(0.1 * noise)
    # A filter that hardly fires, as published ResNets have them.
    norm = model.backbone.body.bn1
    norm.running_var[0], norm.weight[0] = 1e-9, 1e-5
    for block in model.modules():
        if isinstance(block, Bottleneck):
            block.bn3.weight.mul_(0.3)
    return model
