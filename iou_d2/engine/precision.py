"""How the networks of a detector compute: MODEL.PRECISION and MODEL.MEMORY_FORMAT.

Networks are the backbone and the heads: what turns images into features and features into numbers.
In bfloat16 they still put out float32, so that all that follows, coordinates, decoding, scores,
losses and NMS, is as precise as without.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling.meta_arch import GeneralizedRCNN
from torch import Tensor, nn

from iou_d2.detectors.dense import DenseDetector, part_named
from iou_d2.errors import InputError

PRECISIONS = {"float32": False, "bfloat16": True}
# Whether feature maps are channels-last on a device of this type. On CPUs oneDNN computes in that
# order; in the other one it copies each map there and back, which costs bfloat16 more than it wins.
MEMORY_FORMATS = {
    "auto": lambda device: device == "cpu",
    "channels_last": lambda device: True,
    "contiguous": lambda device: False,
}


def with_precision(model: nn.Module, cfg: CfgNode) -> nn.Module:
    """`model`, whose networks compute from now on as MODEL.PRECISION and MODEL.MEMORY_FORMAT say.

    Names, shapes and precision of its tensors stay as they are.

    Raises:
        InputError: another value of one of the keys, or bfloat16 for a model whose networks are
            not known: one that is neither a DenseDetector nor a GeneralizedRCNN.
    """
    is_last = part_named(MEMORY_FORMATS, cfg.MODEL.MEMORY_FORMAT, "MODEL.MEMORY_FORMAT")
    in_bfloat16 = part_named(PRECISIONS, cfg.MODEL.PRECISION, "MODEL.PRECISION")
    device = next(model.parameters()).device.type
    networks = networks_of(model) if in_bfloat16 else []
    if in_bfloat16 and device == "cpu" and not cpu_has_bfloat16():
        logging.getLogger("iou_d2").warning(
            "MODEL.PRECISION is bfloat16, for which this processor has no instructions: float32 is "
            "faster on it."
        )
    for network in networks:
        compute_in_bfloat16(network, device)
    if is_last(device) and hasattr(model, "backbone"):
        # Of weights in another order each convolution makes a copy.
        model.to(memory_format=torch.channels_last)
        model.backbone.register_forward_pre_hook(_channels_last)
    return model


def cpu_has_bfloat16() -> bool:
    """Whether oneDNN computes in bfloat16 on this processor; else torch does, one by one."""
    has_onednn = torch.backends.mkldnn.is_available()
    return has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def networks_of(model: nn.Module) -> list[nn.Module]:
    """The modules that are compiled, and that compute in bfloat16, where that is asked for.

    Left as they are, and in float32, are IoU branches, since the gradients that refine boxes are
    small, what they share with the box head (res5 of IoUNetRes5ROIHeads), and the heads of masks
    and keypoints.
    """
    if isinstance(model, DenseDetector):
        return [model.backbone, model.head]
    if not isinstance(model, GeneralizedRCNN):
        raise InputError(
            "MODEL.PRECISION 'bfloat16' and MODEL.COMPILE True are for dense detectors and "
            f"GeneralizedRCNN, but MODEL.META_ARCHITECTURE is {type(model).__name__}: set them to "
            "'float32' and False."
        )
    heads = model.roi_heads
    networks = [model.backbone, getattr(model.proposal_generator, "rpn_head", None)]
    for name in ("box_head", "box_predictor", "res5"):
        if name == "res5" and hasattr(heads, "iou_branch"):
            continue
        network = getattr(heads, name, None)
        networks += network if isinstance(network, nn.ModuleList) else [network]
    return [network for network in networks if network is not None]


def compute_in_bfloat16(network: nn.Module, device: str) -> None:
    """Run `network` under autocast from now on, and turn what it puts out into float32.

    In hooks and not in a module around it, which would give its parameters other names.
    """
    hooks = _AutocastHooks(device)
    network.register_forward_pre_hook(hooks.before)
    network.register_forward_hook(hooks.after, always_call=True)


class _AutocastHooks:
    """What runs before and after the forward of a network."""

    def __init__(self, device: str):
        self.device = device
        self.entered: list[torch.autocast] = []

    def before(self, network: nn.Module, inputs: tuple) -> None:
        autocast = torch.autocast(self.device, dtype=torch.bfloat16)
        autocast.__enter__()
        self.entered.append(autocast)

    def after(self, network: nn.Module, inputs: tuple, outputs: Any) -> Any:
        """Also runs where the forward raises; `outputs` is then None."""
        self.entered.pop().__exit__(None, None, None)
        return as_float32(outputs)


def as_float32(outputs: Any) -> Any:
    """`outputs`, a tensor or tuples, lists and dicts of them, with bfloat16 as float32."""
    if isinstance(outputs, Tensor):
        return outputs.float() if outputs.dtype == torch.bfloat16 else outputs
    if isinstance(outputs, dict):
        return {key: as_float32(value) for key, value in outputs.items()}
    if not isinstance(outputs, (tuple, list)):
        return outputs
    values = [as_float32(value) for value in outputs]
    return type(outputs)(*values) if hasattr(outputs, "_fields") else type(outputs)(values)


def _channels_last(network: nn.Module, inputs: tuple) -> tuple:
    images, *others = inputs
    return images.contiguous(memory_format=torch.channels_last), *others
