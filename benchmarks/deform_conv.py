"""Deformable convolution on the CPU: ours beside torchvision's, nine look-ups, a plain convolution.

    OMP_NUM_THREADS=2 GOMP_SPINCOUNT=10000 python benchmarks/deform_conv.py [--rounds N]

256 channels, 3x3, on the features of an image of 480x640 and of 800x1333 from stride 8 on, offsets
as VarifocalNet's star convolution has them. The ways take turns in one process; medians of the
milliseconds of all levels together, forward and backward, and the ratio to the nine look-ups.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from tabulate import tabulate
from torch import Tensor

from common import in_turn, machine
from iou_d2.detectors.vfnet import sampled_conv, star_offsets
from iou_d2.layers.deform_conv import deform_conv

CHANNELS = 256
SIZES = ((480, 640), (800, 1333))
WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "nine look-ups (grid_sample)": sampled_conv,
    "torchvision's operator": lambda x, offset, weight: torchvision.ops.deform_conv2d(
        x, offset, weight, padding=1
    ),
    "iou_d2's operator": lambda x, offset, weight: deform_conv(x, offset, weight, padding=1),
    "plain convolution": lambda x, offset, weight: F.conv2d(x, weight, padding=1),
}


def levels(height: int, width: int) -> list[tuple[Tensor, Tensor]]:
    """Features and offsets of each level, the boxes of 4 to 12 cells."""
    torch.manual_seed(0)
    sides = [(-(-height // s), -(-width // s)) for s in (8, 16, 32, 64, 128)]
    return [
        (
            torch.randn(1, CHANNELS, *side).requires_grad_(),
            star_offsets(2 + 4 * torch.rand(1, 4, *side)).requires_grad_(),
        )
        for side in sides
    ]


def runs(height: int, width: int, backward: bool) -> dict[str, Callable]:
    inputs = levels(height, width)
    weight = (0.01 * torch.randn(CHANNELS, CHANNELS, 3, 3)).requires_grad_()

    def run(way):
        with torch.set_grad_enabled(backward):
            for x, offset in inputs:
                y = way(x, offset, weight)
                if backward:
                    y.backward(torch.ones_like(y))

    return {name: lambda way=way: run(way) for name, way in WAYS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    print(f"{machine()}, float32, 1 image, median of {rounds} rounds\n")
    for height, width in SIZES:
        columns = []
        for backward in (False, True):
            times = in_turn(runs(height, width, backward), rounds)
            base = times["nine look-ups (grid_sample)"]
            columns.append(
                [
                    (f"{1000 * statistics.median(values):.0f}",
                     f"{statistics.median(a / b for a, b in zip(values, base)):.2f}")
                    for values in times.values()
                ]
            )  # fmt: skip
        rows = [[name, *one, *both] for name, one, both in zip(WAYS, *columns)]
        headers = [f"{height}x{width}", "forward, ms", "ratio", "with backward, ms", "ratio"]
        print(tabulate(rows, headers, disable_numparse=True), end="\n\n")


if __name__ == "__main__":
    main()
