"""Mixed precision on the CPU, which Detectron2's AMPTrainer, made for float16 on GPUs, refuses."""

from __future__ import annotations

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from torch import nn


class CPUAMPTrainer(SimpleTrainer):
    """SimpleTrainer whose model runs in bfloat16, where autocast finds that safe.

    bfloat16 has the range of float32, so that no loss needs to be scaled. Parameters, losses and
    the optimizer stay in float32.
    """

    def __init__(self, model: nn.Module, data_loader, optimizer: torch.optim.Optimizer):
        super().__init__(model, data_loader, optimizer)
        # The hooks of the model, which look at its losses, are inside.
        self.model = _Autocast(model)


class _Autocast(nn.Module):
    """`module` under autocast; its parameters keep their names in `module`."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.training = module.training

    def forward(self, *args):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.module(*args)


def trainer_class(amp: bool, model: nn.Module) -> type[SimpleTrainer]:
    """What steps the training: in mixed precision where `amp`, on the device of `model`."""
    if not amp:
        return SimpleTrainer
    return AMPTrainer if next(model.parameters()).is_cuda else CPUAMPTrainer
