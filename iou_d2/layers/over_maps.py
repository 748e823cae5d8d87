"""Layers that the levels of a pyramid share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def over_maps(layer: nn.Module, maps: Sequence[Tensor]) -> list[Tensor]:
    """layer(x) for each of `maps`: at once where the forward of the layer has an `of_maps`, as a
    forward of `iou_d2.engine.folding` does, and no hook waits for single maps."""
    of_maps = getattr(layer.forward, "of_maps", None)
    if of_maps is None or is_hooked(layer):
        return [layer(x) for x in maps]
    return of_maps(maps)


def is_hooked(module: nn.Module) -> bool:
    """Whether something else happens when `module` is called than its forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return any((*hooks, module._backward_pre_hooks))
