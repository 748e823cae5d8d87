"""Peak memory of a training step of VarifocalNet and IoU-Net beside their baselines.

    python benchmarks/memory.py [--config CONFIG ...] [--height H] [--width W] [--batch N]
        [--device cpu|cuda]

Two steps of forward, backward and SGD with momentum on random images, on a GPU
the peak of what torch allocates. On the CPU each config has a process of its own, whose peak it is;
"GiB before" are the model and the libraries. Linux only: that comes from /proc.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Sequence

import torch
from tabulate import tabulate

from common import (
    add_device,
    build,
    forget_peak,
    machine,
    peak_gib,
    random_batch,
    seconds,
    training_step,
)

CONFIGS = (
    "retinanet_R_50_FPN_1x",
    "vfnet_R_50_FPN_1x",
    "faster_rcnn_R_50_FPN_1x",
    "iou_net_R_50_FPN_1x",
)


def measure(
    config: str,
    device: str,
    overrides: Sequence[str],
    size: tuple[int, int],
    images: int,
    classes: int = 2,
) -> tuple[float, float, float]:
    """GiB before two steps and at the peak, and the seconds of the faster one."""
    forget_peak(device)
    model = build(config, device, overrides).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-8, momentum=0.9)
    batch = random_batch(images, *size, classes, objects=20)
    before = peak_gib(device)
    times = [seconds(lambda: training_step(model, optimizer, batch)) for _ in range(2)]
    return before, peak_gib(device), min(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", nargs="+", default=CONFIGS, metavar="CONFIG")
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1333)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--opts", nargs="+", default=[], metavar="KEY VALUE", help="for all configs"
    )
    add_device(parser)
    args = parser.parse_args()
    found = {}
    for config in args.config:
        work = (config, args.device, args.opts, (args.height, args.width), args.batch)
        if args.device == "cuda":
            found[config] = measure(*work)
            continue
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[config] = pool.apply(measure, work)
    _, base, _ = found[args.config[0]]
    print(f"{machine(args.device)}; {args.batch} x {args.height} x {args.width}")
    rows = [
        [config, f"{before:.2f}", f"{peak:.2f}", f"{peak / base:.2f}", f"{step:.3f}"]
        for config, (before, peak, step) in found.items()
    ]
    headers = ["config", "GiB before", "GiB at the peak", f"of {args.config[0]}", "s a step"]
    print(tabulate(rows, headers, "github", disable_numparse=True))


if __name__ == "__main__":
    main()
