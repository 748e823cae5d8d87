"""The exponential moving average of the weights of a model in training: SOLVER.EMA_DECAY."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def decay_after(updates: int, decay: float) -> float:
    """min(decay, (1 + t) / (10 + t)) after t updates, so that the first weights are soon forgotten
    (TensorFlow's ExponentialMovingAverage)."""
    return min(decay, (1 + updates) / (10 + updates))


def averaged_copy(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of `model`, whose `update_parameters(model)` moves it towards `model`.

    The first update copies. Each later one makes d * average + (1 - d) * value of every parameter
    and of every buffer of real numbers, the statistics of batch norm among them, with d of
    `decay_after`; buffers of whole numbers are copied. The copy is `.module`, in test mode.
    """

    def update(averages: list[Tensor], values: list[Tensor], updates: Tensor | int) -> None:
        if averages[0].is_floating_point():
            get_ema_multi_avg_fn(decay_after(int(updates), decay))(averages, values, updates)
        else:
            torch._foreach_copy_(averages, values)

    average = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    # A forward that `model` was given as its own attribute would run `model`, not the copy.
    average.module.__dict__.pop("forward", None)
    return average.requires_grad_(False).eval()
