"""Convolution of 3 x 3 weights by the compiled operator of iou_d2 and by PyTorch's.

    OMP_NUM_THREADS=2 GOMP_SPINCOUNT=10000 python benchmarks/conv3x3.py [--rounds N]

Maps are those of heads, FPN and stages of a ResNet-50 for an image of 480 x 640 px, of a VGG-16 for
300 x 300 px with the class scores of SSD, and of a small head for four images of 256 x 320 px,
channels-last, float32; five levels of a head are one row. The two take turns. Prints PyTorch's
median milliseconds of the outputs and of the gradients of inputs and weight together, the median
ratio of a round with the lowest and highest, and the largest errors of both beside float64, as a
share of the largest number.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from common import machine, ratio_of, rounds_asked, seconds
from iou_d2.engine.memory import keep_freed_memory
from iou_d2.layers.conv3x3 import conv3x3_of_maps

# Images, channels, height and width of each map, channels of the output.
PYRAMID = ((60, 80), (30, 40), (15, 20), (8, 10), (4, 5))
SHAPES = [
    (1, 256, PYRAMID, 256),
    (1, 256, ((120, 160),), 256),
    (1, 256, ((60, 80),), 256),
    (1, 256, ((30, 40),), 256),
    (1, 256, ((15, 20),), 256),
    (1, 64, ((120, 160),), 64),
    (1, 128, ((60, 80),), 128),
    (1, 512, ((15, 20),), 512),
    (1, 128, ((150, 150),), 128),
    (1, 512, ((38, 38),), 512),
    (1, 512, ((38, 38),), 324),
    (4, 64, ((32, 40),), 64),
    (4, 64, ((16, 20),), 64),
]
WAYS = {
    "PyTorch": lambda xs, weight: [F.conv2d(x, weight, padding=1) for x in xs],
    "iou_d2": conv3x3_of_maps,
}
STEPS = ("output", "gradients")


def steps_of(
    way: Callable, xs: list[Tensor], weight: Tensor, grads: list[Tensor]
) -> list[Callable]:
    """What computes the outputs and the gradients of inputs and weight."""
    xs, weight = [x.clone().requires_grad_() for x in xs], weight.clone().requires_grad_()
    ys = way(xs, weight)
    return [
        lambda: way([x.detach() for x in xs], weight.detach()),
        lambda: torch.autograd.grad(ys, (*xs, weight), grads, retain_graph=True),
    ]


def share(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


def row_of(shape: tuple, rounds: int) -> list[str]:
    n, c, sizes, d = shape
    generator = torch.Generator().manual_seed(0)

    def numbers(*size: int) -> Tensor:
        x = torch.randn(size, generator=generator)
        return x.to(memory_format=torch.channels_last)

    xs, weight = [numbers(n, c, *size) for size in sizes], numbers(d, c, 3, 3)
    grads = [numbers(n, d, *size) for size in sizes]
    exact = steps_of(
        WAYS["PyTorch"], [x.double() for x in xs], weight.double(), [x.double() for x in grads]
    )
    runs = {name: steps_of(way, xs, weight, grads) for name, way in WAYS.items()}
    errors = {
        name: max(
            share(*pair)
            for step, wanted in zip(steps, exact, strict=True)
            for pair in zip(step(), wanted(), strict=True)
        )
        for name, steps in runs.items()
    }
    row = [f"{n} x {c} x {' + '.join(f'{h} x {w}' for h, w in sizes)} to {d}"]
    for step in range(len(STEPS)):
        times = {name: [] for name in runs}
        for _ in range(rounds):
            for name, steps in runs.items():
                times[name].append(1e3 * seconds(steps[step]))
        ratio = ratio_of(times["iou_d2"], times["PyTorch"])
        row += [f"{statistics.median(times['PyTorch']):.2f}", ratio]
    return [*row, *(f"{error:.0e}" for error in errors.values())]


def main() -> None:
    rounds = rounds_asked(__doc__, default=15)
    keep_freed_memory()
    print(f"{machine('cpu')}, float32, median of {rounds} rounds")
    headers = ["map", *(part for step in STEPS for part in (f"{step}, ms", "ratio"))]
    rows = [row_of(shape, rounds) for shape in SHAPES]
    print(tabulate(rows, [*headers, "error, PyTorch's", "error"], "pipe", disable_numparse=True))


if __name__ == "__main__":
    main()
