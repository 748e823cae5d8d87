"""What precision, order of memory and folded norms cost and save: MODEL.PRECISION,
MODEL.MEMORY_FORMAT, and what iou_d2.engine.folding does on a CPU.

    OMP_NUM_THREADS=2 GOMP_SPINCOUNT=10000 python benchmarks/precision.py [--size HxW] [--images N]
        [--rounds N] [--configs NAME ...] [--cpu] [--device cpu|cuda]

For each config the combinations take turns in one process, with freed memory kept. Prints the
median seconds of a training step (forward, backward, SGD, of N images) and of the networks' forward
of one image without gradients, the median of each round's ratio to what Detectron2 does, float32
NCHW with every norm a step of its own, and its lowest and highest value. --cpu has it count the
seconds of the CPU and not those of the clock, which a busy machine stretches. The weights are
random, so that nothing is detected.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch import GeneralizedRCNN
from tabulate import tabulate
from torch import nn

from common import add_device, machine, random_batch, seconds, training_step
from iou_d2 import get_config
from iou_d2.engine.build import build_detector
from iou_d2.engine.memory import keep_freed_memory
from iou_d2.engine.precision import with_precision

CONFIGS = ["vfnet_R_50_FPN_1x", "quick/vfnet_own_data"]
WAYS = [
    "float32 contiguous unfolded",
    "float32 contiguous",
    "float32 channels_last unfolded",
    "float32 channels_last",
    "bfloat16 contiguous",
    "bfloat16 channels_last unfolded",
    "bfloat16 channels_last",
]
BASELINE = WAYS[0]


def cpu_seconds(function: Callable) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def build(config: str, device: str, name: str) -> nn.Module:
    precision, memory_format, *unfolded = name.split()
    keys = ["MODEL.PRECISION", precision, "MODEL.MEMORY_FORMAT", memory_format]
    cfg = get_config(config, ["MODEL.WEIGHTS", "", "MODEL.DEVICE", device, *keys])
    torch.manual_seed(0)
    return with_precision(build_model(cfg), cfg) if unfolded else build_detector(cfg)


def training(model: nn.Module, batch: list[dict]) -> Callable:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    return lambda: training_step(model.train(), optimizer, batch)


def forward(model: nn.Module, batch: list[dict]) -> Callable:
    """The networks of a dense detector; of an R-CNN, its inference."""

    @torch.no_grad()
    def run():
        model.eval()
        if isinstance(model, GeneralizedRCNN):
            return model(batch[:1])
        return model.predict(model.preprocess_image(batch[:1]).tensor)

    return run


def rows_of(runs: dict[str, Callable], rounds: int, measure: Callable) -> list[list[str]]:
    """A row each: name, seconds, ratio to BASELINE in its round with the extremes.

    A way's turn begins with a run that is not counted: it finds memory as the way before left it.
    """
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            times[name].append(measure(run))
    rows = []
    for name, values in times.items():
        ratios = [value / base for value, base in zip(values, times[BASELINE])]
        spread = f"{min(ratios):.2f} - {max(ratios):.2f}"
        medians = f"{statistics.median(values):.4f}", f"{statistics.median(ratios):.2f}"
        rows.append([name, *medians, spread])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="480x640", metavar="HxW")
    parser.add_argument("--images", type=int, default=2, help="of a training step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--configs", nargs="+", default=CONFIGS, metavar="NAME")
    parser.add_argument("--cpu", action="store_true", help="count seconds of the CPU")
    add_device(parser)
    args = parser.parse_args()
    height, width = map(int, args.size.split("x"))
    keep_freed_memory()
    print(f"{machine(args.device)}, {args.images} images of {height}x{width}")
    for config in args.configs:
        batch = random_batch(args.images, height, width, classes=1)
        models = {name: build(config, args.device, name) for name in WAYS}
        for what, make in (("training step", training), ("forward", forward)):
            runs = {name: make(model, batch) for name, model in models.items()}
            rows = rows_of(runs, args.rounds, cpu_seconds if args.cpu else seconds)
            headers = [f"{config}, {what}", "s", "ratio", "extremes"]
            print(tabulate(rows, headers, "pipe", disable_numparse=True), flush=True)


if __name__ == "__main__":
    main()
