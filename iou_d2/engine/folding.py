"""Convolutions that do the work of the norms and activations behind them, and fewer products.

A frozen batch norm, and any batch norm in inference, maps each channel x to s x + t. So
norm(conv(x; w)) = conv(x; s w, t), which reads and writes the map once where there were two. s w is
computed anew in each forward, since it is small beside the map: no copy of the weights can be out
of date, and gradients reach w.

Where no gradient is asked for, oneDNN also applies the ReLU and adds the shortcut of a residual
block before it writes the map.

Convolutions with 3 x 3 weights and stride 1 go by Winograd's algorithm where that is faster; those
of the levels of a pyramid that share weights do so together, if `over_maps` asks for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from torch import Tensor, nn

from iou_d2.layers.batch_norm import batch_norm, is_compiled_for
from iou_d2.layers.conv3x3 import (
    MULTIPLE,
    conv3x3_and_more,
    conv3x3_of_maps,
    is_worth_it,
    suits,
)
from iou_d2.layers.over_maps import is_hooked, over_maps

from .precision import cpu_has_bfloat16

# Activations by oneDNN's name and numbers, and by the least and the largest that they put out.
_ACTIVATIONS = {nn.ReLU: ("relu", []), nn.ReLU6: ("hardtanh", [0.0, 6.0])}
_ENDS = {nn.ReLU: (0.0, math.inf), nn.ReLU6: (0.0, 6.0)}
_CONVOLUTIONS = (nn.Conv2d.forward, Conv2d.forward)
_BLOCKS = (BasicBlock.forward, BottleneckBlock.forward)
# The operators that torch.compile makes code of. Where a torch lacks them, maps are read and
# written more often, and that is all.
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name)
    for name in ("_convolution_pointwise", "_convolution_pointwise_")
)


def fold_norms(model: nn.Module) -> None:
    """Let the convolutions of `model` do the work of norms and activations from now on, in place.

    These are Detectron2's Conv2d with a norm or an activation, its residual blocks, what is in an
    nn.Sequential, and what `conv3x3` is for; all else stays, and so does what has a hook of its
    own. Outputs agree but for rounding, names and tensors stay as they are.
    """
    for module in model.modules():
        forward = type(module).forward
        if forward in _BLOCKS:
            module.forward = FoldedBlock(module)
        elif forward in _CONVOLUTIONS and (_is_followed(module) or suits(module)):
            module.forward = FoldedConv2d(module)
        elif forward is nn.Sequential.forward and len(module) > 0:
            is_stage = all(type(layer).forward in _BLOCKS for layer in module)
            module.forward = FoldedStage(module) if is_stage else FoldedSequential(module)


class FoldedConv2d:
    """The forward of a convolution, with the norm and activation that Detectron2's may have."""

    def __init__(self, conv: nn.Conv2d):
        self.conv = conv

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, D, h, w)."""
        return self.of_maps([x])[0]

    def of_maps(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """That of each map."""
        conv, norm, activation = self.conv, _norm_of(self.conv), _activation_of(self.conv)
        folds = norm is None or only_scales(norm)
        if folds and _is_activation(activation) and is_fused(conv, norm, xs):
            return fused(conv, norm, activation, xs)
        xs = convolved(conv, norm if folds else None, xs)
        if not folds:
            xs = [_normed(norm, x) for x in xs]
        return xs if activation is None else [activation(x) for x in xs]


class FoldedSequential:
    """The forward of an nn.Sequential in which norms and ReLUs follow convolutions."""

    def __init__(self, layers: nn.Sequential):
        self.layers = layers

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, D, h, w)."""
        return self.of_maps([x])[0]

    def of_maps(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """That of each map."""
        layers = list(self.layers)
        while layers:
            layer = layers.pop(0)
            if _is_plain(layer):
                norm = layers.pop(0) if layers and only_scales(layers[0]) else None
                if layers and _is_activation(layers[0]) and is_fused(layer, norm, xs):
                    xs = fused(layer, norm, layers.pop(0), xs)
                else:
                    xs = convolved(layer, norm, xs)
            elif all(is_compiled_for(layer, x) for x in xs) and not is_hooked(layer):
                clamps = layers and _is_activation(layers[0])
                ends = _ENDS[type(layers.pop(0))] if clamps else ()
                xs = [batch_norm(x, layer, *ends) for x in xs]
            else:
                xs = over_maps(layer, xs)
        return xs


class FoldedBlock:
    """The forward of a BasicBlock or BottleneckBlock of Detectron2."""

    def __init__(self, block: BasicBlock | BottleneckBlock):
        self.block = block

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, D, h, w)."""
        if not self.is_fused(x):
            return type(self.block).forward(self.block, x)
        return self.fused(x, keeps_input=True)

    def is_fused(self, x: Tensor) -> bool:
        """Whether its convolutions of `x` can be computed together with what follows them."""
        return all(
            type(conv).forward is Conv2d.forward
            and conv.activation is None
            and only_scales(conv.norm)
            and is_fused(conv, conv.norm, [x])
            for conv in self.block.children()
        )

    def fused(self, x: Tensor, keeps_input: bool) -> Tensor:
        """The output, where `is_fused`, which is written over `x` unless that is to be kept."""
        shortcut, relu = self.block.shortcut, nn.ReLU()
        if shortcut is not None:
            output = shortcut(x)
        else:
            output = x.clone() if keeps_input else x
        *convs, last = (conv for conv in self.block.children() if conv is not shortcut)
        for conv in convs:
            (x,) = fused(conv, conv.norm, relu, [x])
        return added(output, last, last.norm, relu, x)


class FoldedStage:
    """The forward of an nn.Sequential of such blocks, which alone sees the maps between them."""

    def __init__(self, blocks: nn.Sequential):
        self.blocks = blocks

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, D, h, w)."""
        is_own = False
        for block in self.blocks:
            is_fused = block.forward.is_fused(x) and not is_hooked(block)
            x = block.forward.fused(x, keeps_input=not is_own) if is_fused else block(x)
            is_own = is_fused
        return x


def only_scales(norm: nn.Module | None) -> bool:
    """Whether `norm` maps each channel x to s x + t with an s and t that do not depend on x."""
    if norm is None or is_hooked(norm):
        return False
    if isinstance(norm, FrozenBatchNorm2d):
        return True
    is_batch_norm = isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm))
    return is_batch_norm and not norm.training and norm.track_running_stats and norm.affine


def folded(conv: nn.Conv2d, norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """Weights (D, C / groups, h, w) and bias (D,) of what `conv` and then `norm` do."""
    if norm is None:
        return conv.weight, conv.bias
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    bias = shift if conv.bias is None else shift + scale * conv.bias
    return conv.weight * scale[:, None, None, None], bias


def convolved(conv: nn.Conv2d, norm: nn.Module | None, xs: Sequence[Tensor]) -> list[Tensor]:
    """norm(conv(x)) of each map, of a norm that `only_scales`, without what else a Conv2d of
    Detectron2 has."""
    weight, bias = folded(conv, norm)
    if is_worth_it(conv, xs):
        return conv3x3_of_maps(xs, weight, bias, conv.padding[0])
    return [conv._conv_forward(x, weight, bias) for x in xs]


def is_fused(conv: nn.Conv2d, norm: nn.Module | None, xs: Sequence[Tensor]) -> bool:
    """Whether `conv` of each map can be computed together with `norm` and an activation.

    Not where a gradient is asked for, since oneDNN's operators have none, and not in a graph that
    is to run elsewhere, where they may not be.
    """
    parts = [conv] if norm is None else [conv, norm]
    return (
        _HAS_ONEDNN
        and not (torch.is_grad_enabled() and any(map(_learns, parts)))
        and not (torch.jit.is_tracing() or torch.compiler.is_exporting())
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and not any(map(is_hooked, parts))
        and all(_is_fused_for(x) for x in xs)
    )


def _is_fused_for(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.is_contiguous(memory_format=torch.channels_last)
        and (_dtype_of(x) == torch.float32 or _dtype_of(x) == torch.bfloat16 and cpu_has_bfloat16())
        and not (torch.is_grad_enabled() and x.requires_grad)
    )


def fused(
    conv: nn.Conv2d, norm: nn.Module | None, activation: nn.Module, xs: Sequence[Tensor]
) -> list[Tensor]:
    """activation(norm(conv(x))) of each map, where `is_fused`."""
    if is_worth_it(conv, xs):
        weight, bias = folded(conv, norm)
        return conv3x3_and_more(xs, weight, bias, conv.padding[0], (), *_ENDS[type(activation)])
    name, numbers = _ACTIVATIONS[type(activation)]
    operator = torch.ops.mkldnn._convolution_pointwise
    return [operator(*_inputs(conv, norm, x), name, numbers, "") for x in xs]


def added(
    shortcut: Tensor, conv: nn.Conv2d, norm: nn.Module, activation: nn.Module, x: Tensor
) -> Tensor:
    """activation(shortcut + norm(conv(x))), perhaps written over `shortcut`, where `is_fused`."""
    if conv.out_channels % MULTIPLE == 0 and is_worth_it(conv, [x]):
        (weight, bias), ends = folded(conv, norm), _ENDS[type(activation)]
        return conv3x3_and_more([x], weight, bias, conv.padding[0], [shortcut], *ends)[0]
    name, numbers = _ACTIVATIONS[type(activation)]
    return torch.ops.mkldnn._convolution_pointwise_.binary(
        shortcut.to(_dtype_of(x)), *_inputs(conv, norm, x), "add", 1.0, name, numbers, ""
    )


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    is_compiled = is_compiled_for(norm, x) and not is_hooked(norm)
    return batch_norm(x, norm) if is_compiled else norm(x)


def _inputs(conv: nn.Conv2d, norm: nn.Module | None, x: Tensor) -> tuple:
    tensors = (None if each is None else each.to(_dtype_of(x)) for each in (x, *folded(conv, norm)))
    return *tensors, conv.padding, conv.stride, conv.dilation, conv.groups


def _dtype_of(x: Tensor) -> torch.dtype:
    """What a convolution of `x` is computed in."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _is_plain(module: nn.Module) -> bool:
    """Whether `module` is a convolution and nothing else."""
    is_convolution = type(module).forward in _CONVOLUTIONS and not is_hooked(module)
    return is_convolution and not _is_followed(module)


def _is_followed(conv: nn.Conv2d) -> bool:
    """Whether `conv` is Detectron2's with a norm or an activation of its own."""
    return _norm_of(conv) is not None or _activation_of(conv) is not None


def _norm_of(conv: nn.Conv2d) -> nn.Module | None:
    return getattr(conv, "norm", None)


def _activation_of(conv: nn.Conv2d) -> Callable[[Tensor], Tensor] | None:
    return getattr(conv, "activation", None)


def _is_activation(module: nn.Module) -> bool:
    return type(module) in _ENDS and not is_hooked(module)


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
