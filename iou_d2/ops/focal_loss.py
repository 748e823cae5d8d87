"""The focal loss of anchors with class labels and its gradient, in one pass (arXiv 1708.02002).

An image of 800 x 1333 has 200,000 anchors with 80 scores each. The labels as ones and zeros, and
what autograd keeps of each step of the formula, are several times as large as the scores. Here the
rows go through all steps in parts, which stay in the processor's cache, and the gradient alone is
kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Scores that a CPU works on at a time: a handful of tensors of half a megabyte. A GPU has all at
# once, for it would wait for the launches of the parts.
_CPU_SCORES = 2**17


def focal_loss_of_labels(
    logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Eqn. 5, summed over all scores: -alpha (1 - p)^gamma log(p) at the class of an anchor, and
    -(1 - alpha) p^gamma log(1 - p) elsewhere.

    Args:
        logits: (R, K), class scores before the sigmoid. Half precision is computed in float32.
        labels: (R,) int64: a class below K, K for the background, negative for an anchor that does
            not count.

    Returns:
        A scalar, which is 0 with gradients where R is 0.

    Raises:
        ValueError: the shapes do not fit, or a label is over K.
        RuntimeError: on a second derivative.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"Logits are (R, K) and labels (R,), not {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}."
        )
    if len(labels) and labels.max() > logits.shape[1]:
        raise ValueError(
            f"A label is {labels.max().item()}, but the logits are of {logits.shape[1]} classes."
        )
    return _FocalLoss.apply(logits, labels, alpha, gamma)


class _FocalLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(gradient)
        rows, count = _rows_at_a_time(logits), len(logits)
        losses = [logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))]
        for start in range(0, count, rows):
            part = slice(start, start + rows)
            loss, slope = _loss_and_slope(logits[part], labels[part], alpha, gamma)
            losses.append(loss)
            if gradient is not None:
                gradient[part] = slope
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None


def _rows_at_a_time(logits: Tensor) -> int:
    if logits.device.type != "cpu":
        return max(len(logits), 1)
    return max(_CPU_SCORES // max(logits.shape[1], 1), 1)


def _loss_and_slope(
    logits: Tensor, labels: Tensor, alpha: float, gamma: float
) -> tuple[Tensor, Tensor]:
    """The loss, a scalar, and its gradient (R, K)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss, slope = _of_zeros(logits, 1 - alpha, gamma)
    # At a class of every row, so that a GPU is not asked which rows have an object.
    at = labels.clamp(0, logits.shape[1] - 1)[:, None]
    is_object = (labels == at[:, 0])[:, None]
    loss_at, slope_at = _of_zeros(-logits.gather(1, at), alpha, gamma)
    loss.scatter_(1, at, loss_at.where(is_object, loss.gather(1, at)))
    slope.scatter_(1, at, (-slope_at).where(is_object, slope.gather(1, at)))
    ignored = labels < 0
    loss = loss.sum(dim=1).masked_fill(ignored, 0)
    return loss.sum(), slope.masked_fill_(ignored[:, None], 0)


def _of_zeros(logits: Tensor, weight: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Losses of scores that are to be 0, and their derivatives. Of scores that are to be 1 they are
    those of the negated logits, the derivatives negated too."""
    p, cost = logits.sigmoid(), F.softplus(logits)  # -log(1 - p)
    factor = p.pow(gamma).mul_(weight)
    slope = (1 - p).mul_(gamma).mul_(cost).add_(p).mul_(factor)
    return cost.mul_(factor), slope
