"""A detector learns two boxes of one image from scratch."""

from __future__ import annotations

import torch
from torch import nn


def assert_learns_two_boxes(
    model: nn.Module, entry: dict, steps: int = 60, tolerance: float = 4
) -> None:
    """`model` has two classes; `entry` is an image of 128 pixels with two objects, which become
    others. After so many `steps` no corner is off by the `tolerance` in pixels."""
    truth = entry["instances"]
    truth.gt_boxes.tensor = torch.tensor([[10.0, 12, 50, 40], [60, 64, 120, 126]])
    truth.gt_classes = torch.tensor([0, 1])
    entry["image"][:, 12:40, 10:50] = 255
    entry["image"][0, 64:126, 60:120] = 0
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=0.003)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        losses = model([entry])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        found = model.eval()([entry])[0]["instances"][:2]
    order = found.pred_classes.argsort()
    assert found.pred_classes[order].tolist() == [0, 1] and found.scores.min() > 0.5
    assert (found.pred_boxes.tensor[order] - truth.gt_boxes.tensor).abs().max() < tolerance
