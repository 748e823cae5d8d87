"""Batch norm whose statistics are fixed as a part of the convolution before it: MODEL.FOLD_NORM.

FrozenBatchNorm2d, and any batch norm of a model that is tested, scales and shifts a channel by
numbers that no image changes: y = s (w * x + b) + t = (s w) * x + (s b + t). On a CPU it takes less
time to scale the weights than to go over the feature map once more, and again in the gradient.
"""

from __future__ import annotations

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops.misc import Conv2dNormActivation

_NORMS = (FrozenBatchNorm2d, _BatchNorm)


def fold_norms(model: nn.Module) -> nn.Module:
    """`model`, whose convolutions do from now on what the batch norm behind them did, wherever its
    statistics are fixed and that is less work. Outputs and gradients are the same but for rounding.

    Modules, names and tensors stay, so that weights can be loaded, trained, frozen and saved as
    before; a hook on a norm that is folded does not run. Found are Detectron2's `Conv2d` with a
    norm, and convolutions with a norm behind them in an `nn.Sequential` or torchvision's
    `Conv2dNormActivation`; classes derived from these are left alone.
    """
    for module in model.modules():
        if type(module) is Conv2d and isinstance(module.norm, _NORMS):
            module.__class__ = FoldingConv2d
        elif type(module) in (nn.Sequential, Conv2dNormActivation):
            if any(isinstance(layer, _NORMS) for layer in module):
                module.__class__ = FoldingSequential
    return model


class FoldingConv2d(Conv2d):
    """Detectron2's convolution with a norm, which it folds where that is less work."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K, h, w)."""
        if not is_less_work(self, self.norm, x):
            return super().forward(x)
        x = convolve_and_norm(self, self.norm, x)
        return x if self.activation is None else self.activation(x)


class FoldingSequential(nn.Sequential):
    """Layers in turn; a norm is folded into the convolution before it where that is less work."""

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self)
        while layers:
            layer = layers.pop(0)
            if layers and isinstance(layer, nn.Conv2d) and is_less_work(layer, layers[0], x):
                x = convolve_and_norm(layer, layers.pop(0), x)
            else:
                x = layer(x)
        return x


def is_less_work(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> bool:
    """Whether the statistics of `norm` are fixed, and a channel of what `conv` makes of `x` has
    more pixels than weights. Never in torch.compile, which fuses the norm in its own way."""
    is_fixed = isinstance(norm, FrozenBatchNorm2d) or (
        isinstance(norm, _BatchNorm) and not norm.training and norm.running_var is not None
    )
    if not is_fixed or torch.compiler.is_compiling():
        return False
    pixels = len(x) * (x.shape[2] // conv.stride[0]) * (x.shape[3] // conv.stride[1])
    return pixels > conv.weight[0].numel()


def convolve_and_norm(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """norm(conv(x)) for a `norm` of fixed statistics. (N, C, H, W) -> (N, K, h, w)."""
    scale = (norm.running_var + norm.eps).rsqrt()
    shift = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    return conv._conv_forward(x, conv.weight * scale.view(-1, 1, 1, 1), shift)
