"""Classification losses whose target is a quality, such as the IoU of a box, in place of 0 or 1.

All take `logits` (R, K), class scores of R points before the sigmoid, and `targets` (R, K): the
quality in (0, 1] at the class of a positive point, 0 everywhere else. They return the sum, a
scalar, which is 0 with gradients where R is 0. Half precision is computed in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss


def varifocal_loss(
    logits: Tensor,
    targets: Tensor,
    alpha: float = 0.75,
    gamma: float = 2.0,
    iou_weighted: bool = True,
) -> Tensor:
    """Varifocal loss, arXiv 2008.13367, Eqn. 2.

    A positive has the weight of its quality, or 1 without `iou_weighted`; a negative alpha *
    p^gamma, through which the gradient flows.
    """
    logits, targets = _at_least_float32(logits), _at_least_float32(targets)
    negative_weight = alpha * logits.sigmoid().pow(gamma)
    positive_weight = targets if iou_weighted else torch.ones_like(targets)
    weight = positive_weight.where(targets > 0, negative_weight)
    return (weight * _cross_entropy(logits, targets)).sum()


def quality_focal_loss(logits: Tensor, targets: Tensor, beta: float = 2.0) -> Tensor:
    """Quality focal loss, arXiv 2006.04388, Eqn. 4: every entry has the weight |q - p|^beta."""
    logits, targets = _at_least_float32(logits), _at_least_float32(targets)
    weight = (targets - logits.sigmoid()).abs().pow(beta)
    return (weight * _cross_entropy(logits, targets)).sum()


def focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss, arXiv 1708.02002, Eqn. 5, for which every positive has the target 1."""
    logits = _at_least_float32(logits)
    return sigmoid_focal_loss(logits, (targets > 0).to(logits), alpha, gamma, reduction="sum")


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
