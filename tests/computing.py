"""In which precision a model computes, seen from outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook


@contextmanager
def dtypes_of_convolutions() -> Iterator[set[torch.dtype]]:
    """The dtypes that convolutions of any module put out meanwhile; filled as they run."""
    seen: set[torch.dtype] = set()

    def look(module, inputs, output):
        if isinstance(module, nn.Conv2d):
            seen.add(output.dtype)

    handle = register_module_forward_hook(look)
    try:
        yield seen
    finally:
        handle.remove()
