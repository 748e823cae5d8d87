"""Parts of a model that do not learn: SOLVER.FREEZE."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from iou_d2.errors import InputError

from .parameter_names import is_under, parameters_of, require_names


def freeze(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Let the parameters whose names begin with one of `names` learn nothing, in place.

    Batch norm in a frozen module becomes Detectron2's FrozenBatchNorm2d, as that of the stages
    which MODEL.BACKBONE.FREEZE_AT freezes: it keeps the statistics that are loaded, and its tensors
    keep their names. A name of a single weight freezes that weight alone.

    Called before the weights are loaded and before processes share gradients.

    Returns:
        The names of the parameters that were frozen.

    Raises:
        InputError: a name begins no parameter, or nothing is left to learn.
    """
    require_names(model, names, "SOLVER.FREEZE")
    frozen = []
    for name, parameter in parameters_of(model).items():
        if any(is_under(name, beginning) for beginning in names):
            parameter.requires_grad_(False)
            frozen.append(name)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"SOLVER.FREEZE {list(names)} leaves no parameter to learn.")
    for name in names:
        if name in dict(model.named_modules()):
            part = model.get_submodule(name)
            converted = FrozenBatchNorm2d.convert_frozen_batchnorm(part)
            if converted is not part:
                model.set_submodule(name, converted)
    return frozen
