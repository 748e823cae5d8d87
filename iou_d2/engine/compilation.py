"""torch.compile of the networks of a detector: MODEL.COMPILE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from iou_d2.errors import InputError


class CompiledForward:
    """The `forward` of a network, compiled at its first call, and again for what differs by more
    than sizes that it has seen to vary: training or not, gradients or not, dtype.

    Not `nn.Module.compile`, which leaves out the `forward` of torch's own containers and what a
    copy of the module is to do. A copy of the network compiles its own forward.
    """

    def __init__(self, forward: Callable, backend: str | Callable):
        self.forward = forward
        self.backend = backend
        self.compiled = torch.compile(forward, backend=backend)

    def __call__(self, *args, **kwargs) -> Any:
        return self.compiled(*args, **kwargs)

    def __reduce__(self) -> tuple:
        return CompiledForward, (self.forward, self.backend)


def compile_networks(networks: list[nn.Module], backend: str | Callable = "inductor") -> None:
    """Compile the `forward` of each network, in place: names and tensors stay as they are.

    Hooks stay outside. `backend`: see torch.compile.
    """
    for network in networks:
        network.forward = CompiledForward(network.forward, backend)


def require_compiler(device: str) -> None:
    """Raise an InputError in a sentence where torch.compile does not work for `device`, such as
    without a C++ compiler or, on GPUs, without Triton."""
    try:
        torch.compile(_double)(torch.zeros(8, device=device))
    except Exception as error:  # of many kinds, by what is missing
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(
            f"MODEL.COMPILE is True, but torch.compile does not work here for {device}: "
            f"{reason}. Set it to False, or install what is missing (g++ and the headers of "
            "Python; for GPUs also Triton)."
        ) from error


def _double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x
