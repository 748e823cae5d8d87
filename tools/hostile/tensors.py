"""Random tensors, from ordinary to absurd."""

from __future__ import annotations

from random import Random

import torch
from torch import Tensor

SPECIAL = (0.0, -0.0, 1e-30, 1e-9, 1.0, 1e6, 1e12, 1e19, 3e38, -1e6, -3e38)
NOT_FINITE = (float("nan"), float("inf"), -float("inf"))
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def generator_of(rng: Random) -> torch.Generator:
    return torch.Generator().manual_seed(rng.getrandbits(63))


def boxes(rng: Random, count: int, *, wild: float = 0.3, finite: bool = False) -> Tensor:
    """(count, 4) float64 XYXY: near one another in an image and, with the chance `wild`, also
    inverted, without area, equal, huge, tiny or not finite."""
    generator = generator_of(rng)
    side = 10.0 ** rng.choice((0, 1, 2, 2, 2, 3, 4))
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * side
    size = torch.rand(count, 2, generator=generator, dtype=torch.float64) * side
    found = torch.cat([corner, corner + size], dim=1) - rng.choice((0.0, 0.0, side / 2))
    if rng.random() < 0.3:
        found = found.round()
    if count and rng.random() < wild:
        for _ in range(rng.randint(1, 3)):
            _spoil(rng, found, finite)
    return found


def _spoil(rng: Random, found: Tensor, finite: bool) -> None:
    row, column = rng.randrange(len(found)), rng.randrange(4)
    how = rng.randrange(6)
    if how == 0:
        found[row] = found[row].flip(0)
    elif how == 1:
        found[row, 2:] = found[row, :2]
    elif how == 2:
        found[row] = found[rng.randrange(len(found))]
    elif how == 3:
        found[row, column] = rng.choice(SPECIAL)
    elif how == 4:
        found[row] *= rng.choice((1e-6, 1e3, 1e6, 1e16))
    elif not finite:
        found[row, column] = rng.choice(NOT_FINITE)


def laid_out(rng: Random, values: Tensor) -> Tensor:
    """The same values, perhaps not contiguous."""
    how = rng.randrange(4)
    if how == 0 and values.dim():
        return values.repeat_interleave(2, dim=0)[::2]
    if how == 1 and values.dim() > 1:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    return values
