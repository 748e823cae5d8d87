"""Deformable convolution: ours beside torchvision's, nine look-ups, a plain convolution.

    OMP_NUM_THREADS=2 GOMP_SPINCOUNT=10000 python benchmarks/deform_conv.py [--rounds N]
        [--device cpu|cuda]

256 channels, 3x3, on the features of an image of 480x640 and of 800x1333 from stride 8 on, offsets
as VarifocalNet's star convolution has them. The ways take turns in one process; medians of the
milliseconds of all levels together, forward and backward, and the ratio to the nine look-ups. On
CUDA ours is torchvision's, safe where an offset is no number.
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

from common import add_device, in_turn, machine
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


def levels(height: int, width: int, device: str) -> list[tuple[Tensor, Tensor]]:
    """Features and offsets of each level, the boxes of 4 to 12 cells."""
    torch.manual_seed(0)
    sides = [(-(-height // s), -(-width // s)) for s in (8, 16, 32, 64, 128)]
    return [
        (
            torch.randn(1, CHANNELS, *side, device=device).requires_grad_(),
            star_offsets(2 + 4 * torch.rand(1, 4, *side, device=device)).requires_grad_(),
        )
        for side in sides
    ]


def runs(height: int, width: int, device: str, backward: bool) -> dict[str, Callable]:
    inputs = levels(height, width, device)
    weight = (0.01 * torch.randn(CHANNELS, CHANNELS, 3, 3, device=device)).requires_grad_()

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
    add_device(parser)
    args = parser.parse_args()
    rounds = args.rounds
    print(f"{machine(args.device)}, float32, 1 image, median of {rounds} rounds\n")
    for height, width in SIZES:
        columns = []
        for backward in (False, True):
            times = in_turn(runs(height, width, args.device, backward), rounds)
            base = times["nine look-ups (grid_sample)"]
            columns.append(
                [
                    (f"{1000 * statistics.median(values):.3g}",
                     f"{statistics.median(a / b for a, b in zip(values, base)):.2f}")
                    for values in times.values()
                ]
            )  # fmt: skip
        rows = [[name, *one, *both] for name, one, both in zip(WAYS, *columns)]
        headers = [f"{height}x{width}", "forward, ms", "ratio", "with backward, ms", "ratio"]
        print(tabulate(rows, headers, "pipe", disable_numparse=True), end="\n\n")


if __name__ == "__main__":
    main()
