"""Models with random weights that detect something."""

from __future__ import annotations

import torch
from torch import nn


def excite(model: nn.Module) -> nn.Module:
    """Raise the weights of the last layers, so that random ones detect and predict something."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "cls_score" in name or "iou_pred" in name:
            nn.init.normal_(parameter, std=0.3)
        elif "bbox_pred" in name:
            nn.init.normal_(parameter, std=0.05)
    return model
