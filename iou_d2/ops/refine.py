"""Box refinement by gradient ascent on any differentiable score (arXiv 1807.11590, Algorithm 2).

Shape letters: R boxes of all images, S of them that still move. Boxes are XYXY, absolute pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# (S, 4) boxes and their (S,) indices among all boxes -> (S,) scores. A box's score depends on no
# other box.
ScoreFunction = Callable[[Tensor, Tensor], Tensor]
# Boxes (R, 4) and whether their gradients are wanted -> scores (R,) and those gradients (R, 4).
Evaluation = Callable[[Tensor, bool], tuple[Tensor, Tensor | None]]
# Boxes (R, 4) and scores (R,) as they are at a step, for it to keep.
Observer = Callable[[Tensor, Tensor], None]


def refine_boxes(
    boxes: Tensor,
    score_function: ScoreFunction,
    limits: Tensor,
    *,
    steps: int = 5,
    step_size: float = 0.5,
    early_stop: float = 0.001,
    max_drop: float = -0.01,
    roll_back: bool = False,
    observe: Observer | None = None,
) -> tuple[Tensor, Tensor]:
    """Move boxes uphill on their score; what it costs is a forward and a backward pass a step.

    A step moves x1 and x2 by `step_size` * gradient * width, and y1 and y2 alike with the height. A
    box stops after a step that changed its score by less than `early_stop` or by less than
    `max_drop`, and keeps that step, as published. A step that would leave a box without an area or
    with a score or coordinate that is not finite is not taken, and ends it.

    The caller may be in `no_grad` or `inference_mode`; tensors that `score_function` was given from
    inference mode must have gone through `leave_inference_mode`. No parameter gets a gradient.

    Args:
        boxes: (R, 4) finite.
        score_function: see ScoreFunction; differentiable in the boxes.
        limits: (R, 2) width and height of each box's image. Boxes are clipped to it before the
            first step and after each.
        steps: T of Algorithm 2; 0 only clips and scores.
        step_size: lambda.
        early_stop, max_drop: Omega_1 and Omega_2.
        roll_back: undo a step that lowered the score, and stop the box there.
        observe: is given all boxes before the first step and after each, until none moves.

    Returns:
        boxes: (R, 4) float32, inside the limits and never inverted; (0, 4) for no boxes.
        scores: (R,) score of each.

    Raises:
        ValueError: wrong shapes, or a negative number of steps.
    """
    if boxes.dim() != 2 or boxes.shape[1] != 4 or limits.shape != (len(boxes), 2):
        raise ValueError(
            f"Boxes are (R, 4) and limits (R, 2), not {tuple(boxes.shape)} and "
            f"{tuple(limits.shape)}."
        )
    if steps < 0:
        raise ValueError(f"The number of steps is at least 0, but it is {steps}.")
    if not len(boxes):
        return boxes.new_zeros((0, 4), dtype=torch.float32), boxes.new_zeros(0)

    with torch.inference_mode(False), torch.no_grad():
        boxes, limits = clip_boxes(boxes.detach().float(), limits), limits.clone()
        if boxes.is_cuda and observe is None:
            every = torch.arange(len(boxes), device=boxes.device)
            return ascend_together(
                lambda moved, with_gradient: _evaluate(
                    score_function, moved, every, with_gradient=with_gradient
                ),
                boxes,
                limits,
                steps=steps,
                step_size=step_size,
                early_stop=early_stop,
                max_drop=max_drop,
                roll_back=roll_back,
            )
        moving = torch.arange(len(boxes), device=boxes.device)
        scores, gradient = _evaluate(score_function, boxes, moving, with_gradient=steps > 0)
        scores = scores.clone()
        if observe is not None:
            observe(boxes.clone(), scores.clone())
        for step in range(steps):
            size = boxes[moving, 2:] - boxes[moving, :2]
            moved = boxes[moving] + step_size * gradient * size.repeat(1, 2)
            finite = moved.isfinite().all(1)
            moved = clip_boxes(moved, limits[moving])
            taken = finite & (moved[:, 2:] > moved[:, :2]).all(1)
            moving, moved, gradient = moving[taken], moved[taken], None
            if not len(moving):
                break
            new, gradient = _evaluate(score_function, moved, moving, with_gradient=step + 1 < steps)
            change = new - scores[moving]
            taken = change >= 0 if roll_back else change.isfinite()
            boxes[moving[taken]], scores[moving[taken]] = moved[taken], new[taken]
            if observe is not None:
                observe(boxes.clone(), scores.clone())
            goes_on = taken & (change.abs() >= early_stop) & (change >= max_drop)
            moving = moving[goes_on]
            gradient = None if gradient is None else gradient[goes_on]
    return boxes, scores


def ascend_together(
    evaluate: Evaluation,
    boxes: Tensor,
    limits: Tensor,
    *,
    steps: int,
    step_size: float,
    early_stop: float,
    max_drop: float,
    roll_back: bool,
) -> tuple[Tensor, Tensor]:
    """What `refine_boxes` makes of boxes that are clipped: all go through all steps, and masks say
    which of them move. Nothing waits for a GPU to say how many there are, and no graph needs to
    know.

    Args:
        boxes: (R, 4) inside the limits; R may be 0.
        limits: (R, 2) or (1, 2).
    """
    scores, gradient = evaluate(boxes, steps > 0)
    moving = torch.ones_like(scores, dtype=torch.bool)
    for step in range(steps):
        sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        moved = boxes + step_size * gradient * sides
        moving = moving & moved.isfinite().all(dim=1)
        moved = clip_boxes(moved, limits)
        moving = moving & (moved[:, 2:] > moved[:, :2]).all(dim=1)
        moved = torch.where(moving[:, None], moved, boxes)
        new, gradient = evaluate(moved, step + 1 < steps)
        change = new - scores
        moving = moving & ((change >= 0) if roll_back else change.isfinite())
        boxes = torch.where(moving[:, None], moved, boxes)
        scores = torch.where(moving, new, scores)
        moving = moving & (change.abs() >= early_stop) & (change >= max_drop)
    return boxes, scores


def leave_inference_mode(tensor: Tensor) -> Tensor:
    """`tensor` without its history and, where inference mode made it, as a copy for autograd."""
    with torch.inference_mode(False):
        return tensor.clone() if tensor.is_inference() else tensor.detach()


def clip_boxes(boxes: Tensor, limits: Tensor) -> Tensor:
    """Boxes inside (0, 0, width, height); an inverted side becomes 0."""
    top_left = boxes[:, :2].clamp(min=0).minimum(limits)
    bottom_right = boxes[:, 2:].clamp(min=0).minimum(limits)
    return torch.cat([top_left, bottom_right.maximum(top_left)], dim=1)


def _evaluate(
    score_function: ScoreFunction, boxes: Tensor, index: Tensor, *, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Scores (S,) of boxes and, where asked for, their gradients (S, 4)."""
    if not with_gradient:
        return score_function(boxes, index), None
    with torch.enable_grad():
        boxes = boxes.detach().requires_grad_()
        scores = score_function(boxes, index)
        (gradient,) = torch.autograd.grad(scores.sum(), boxes)
    return scores.detach(), gradient
