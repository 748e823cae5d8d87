"""RoIAlign by the compiled operator of iou_d2 and by torchvision's.

    OMP_NUM_THREADS=2 GOMP_SPINCOUNT=10000 python benchmarks/roi_align.py [--rounds N]

A channels-last map of 256 channels, stride 4 for an image of 480 x 640 px, 7 x 7 bins, float32; 512
RoIs are those of a training step, 1000 those of an image. The two take turns. Prints torchvision's
median milliseconds forward and of the gradient of the map, and the median ratio of a round with the
lowest and highest.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from tabulate import tabulate
from torch import Tensor
from torchvision import ops

from common import machine, ratio_of, rounds_asked, seconds
from iou_d2.engine.memory import keep_freed_memory
from iou_d2.layers.roi_align import roi_align

STRIDE, HEIGHT, WIDTH, CHANNELS = 4, 120, 160, 256
# RoIs, their shortest and longest side in pixels of the image, samples along a side of a bin.
CASES = [(512, 28, 112, 2), (512, 28, 112, 0), (1000, 28, 112, 2), (1000, 28, 112, 0)]
WAYS = {"torchvision": ops.roi_align, "iou_d2": roi_align}


def random_rois(count: int, least: float, most: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    sides = least + (most - least) * torch.rand(count, 2, generator=generator)
    space = torch.tensor([WIDTH * STRIDE, HEIGHT * STRIDE]) - sides
    corner = space * torch.rand(count, 2, generator=generator)
    return torch.cat([torch.zeros(count, 1), corner, corner + sides], dim=1)


def steps_of(way: Callable, rois: Tensor, ratio: int) -> list[Callable]:
    """What computes the bins, and what computes the gradient of the map."""
    torch.manual_seed(0)
    features = torch.randn(1, CHANNELS, HEIGHT, WIDTH).to(memory_format=torch.channels_last)
    features.requires_grad_()
    arguments = (rois, (7, 7), 1 / STRIDE, ratio, True)
    y = way(features, *arguments)
    grad = torch.ones_like(y)
    return [
        lambda: way(features.detach(), *arguments),
        lambda: torch.autograd.grad(y, features, grad, retain_graph=True),
    ]


def main() -> None:
    rounds = rounds_asked(__doc__, default=15)
    keep_freed_memory()
    print(f"{machine('cpu')}, float32, median of {rounds} rounds")
    rows = []
    for count, least, most, ratio in CASES:
        rois = random_rois(count, least, most)
        steps = {name: steps_of(way, rois, ratio) for name, way in WAYS.items()}
        row = [f"{count} of {least}-{most} px", ratio * ratio or "one a feature pixel"]
        for step in (0, 1):
            times = {name: [] for name in WAYS}
            for _ in range(rounds):
                for name in WAYS:
                    times[name].append(1e3 * seconds(steps[name][step]))
            spread = ratio_of(times["iou_d2"], times["torchvision"], digits=3)
            row += [f"{statistics.median(times['torchvision']):.1f}", spread]
        rows.append(row)
    headers = ["RoIs", "samples a bin", "forward, ms", "ratio", "backward, ms", "ratio"]
    print(tabulate(rows, headers, "pipe", disable_numparse=True))


if __name__ == "__main__":
    main()
