"""Batch norm and ReLU6 in training by the compiled operator of iou_d2 and by PyTorch's two.

    OMP_NUM_THREADS=2 GOMP_SPINCOUNT=10000 python benchmarks/batch_norm.py [--rounds N]

Maps are those of a MobileNetV2 for four images of 320 x 416 px, channels-last, float32. The ways
take turns. Prints the median milliseconds forward and backward, the median ratio to PyTorch's in
its round with the lowest and highest, beside a copy of the map, and the largest error of the
outputs and of the weights' gradients beside float64, as a share of the largest number.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

from common import machine, ratio_of, rounds_asked, seconds
from iou_d2.engine.memory import keep_freed_memory
from iou_d2.layers.batch_norm import batch_norm

SHAPES = [
    (4, 96, 160, 208),
    (4, 144, 80, 104),
    (4, 192, 40, 52),
    (4, 576, 20, 26),
    (4, 960, 10, 13),
]
WAYS = {
    "PyTorch": lambda x, norm: F.hardtanh(norm(x), 0, 6),
    "iou_d2": lambda x, norm: batch_norm(x, norm, 0, 6),
}


def differentiated(way: Callable, x: Tensor, grad: Tensor) -> tuple[Callable, Callable]:
    """What computes the outputs, and what computes the gradients of x, weight and bias."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(x.shape[1])
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias, 1.0)
    norm.to(x.dtype)
    x = x.clone().requires_grad_()
    y = way(x, norm)
    return (
        lambda: way(x, norm),
        lambda: torch.autograd.grad(y, (x, norm.weight, norm.bias), grad, retain_graph=True),
    )


def share(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


def rows_of(shape: tuple[int, ...], rounds: int) -> list[list[str]]:
    generator = torch.Generator().manual_seed(0)
    x, grad = (
        (mean + 2 * torch.randn(shape, generator=generator)).to(memory_format=torch.channels_last)
        for mean in (3, 0)
    )
    exact, exact_gradients = differentiated(WAYS["PyTorch"], x.double(), grad.double())
    runs = {name: differentiated(way, x, grad) for name, way in WAYS.items()}
    times = {(name, step): [] for name in runs for step in (0, 1)}
    copies, to = [], torch.empty_like(x)
    for _ in range(rounds):
        for key in times:
            name, step = key
            times[key].append(1e3 * seconds(runs[name][step]))
        copies.append(1e3 * seconds(lambda: to.copy_(x)))
    rows = []
    for name, (forward, backward) in runs.items():
        row = ["x".join(map(str, shape)), name, f"{statistics.median(copies):.2f}"]
        for step in (0, 1):
            ratio = ratio_of(times[name, step], times["PyTorch", step])
            row += [f"{statistics.median(times[name, step]):.2f}", ratio]
        _, *found = backward()
        of_weights = max(map(share, found, exact_gradients()[1:]))
        rows.append([*row, f"{share(forward(), exact()):.0e}", f"{of_weights:.0e}"])
    return rows


def main() -> None:
    rounds = rounds_asked(__doc__, default=15)
    keep_freed_memory()
    print(f"{machine('cpu')}, float32, median of {rounds} rounds")
    rows = [row for shape in SHAPES for row in rows_of(shape, rounds)]
    headers = ["map", "", "copy, ms", "forward, ms", "ratio", "backward, ms", "ratio"]
    headers += ["error of outputs", "of weights' gradients"]
    print(tabulate(rows, headers, "pipe", disable_numparse=True))


if __name__ == "__main__":
    main()
