"""What MODEL.COMPILE saves, and what it costs before.

    OMP_NUM_THREADS=2 GOMP_SPINCOUNT=10000 python benchmarks/compile.py [--size HxW] [--images N]
        [--rounds N] [--configs NAME ...] [--precision NAME] [--device cpu|cuda] [--another-size]

For each config the model with and without take turns in one process. Prints the seconds of the
first training step (forward, backward, SGD, of N images) and of the first forward of the networks
for one image without gradients, which compile; the median of those after it; and the median, lowest
and highest ratio to the model without, of rounds. --another-size has all of that again at another
size, at which code for sizes that vary is compiled. Nothing is read from inductor's cache, or left
there. The weights are random, so that nothing is detected.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable

import torch
from detectron2.modeling.meta_arch import GeneralizedRCNN
from tabulate import tabulate
from torch import nn

from common import in_turn, machine, random_batch, seconds, training_step
from iou_d2 import get_config
from iou_d2.engine.trainer import Trainer

CONFIGS = ["retinanet_R_50_FPN_1x", "quick/vfnet_own_data"]
NAMES = {"as it is": False, "compiled": True}


def build(config: str, compiled: bool, precision: str, device: str) -> nn.Module:
    keys = ["MODEL.COMPILE", str(compiled), "MODEL.PRECISION", precision, "MODEL.DEVICE", device]
    torch.manual_seed(0)
    return Trainer.build_model(get_config(config, ["MODEL.WEIGHTS", "", *keys]))


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


def rows_of(runs: dict[str, Callable], rounds: int) -> list[list[str]]:
    """A row each: name, seconds of the first, median of the others, ratio with the extremes."""
    firsts = {name: seconds(run) for name, run in runs.items()}
    times = in_turn(runs, rounds)
    rows = []
    for name, values in times.items():
        ratios = [value / base for value, base in zip(values, times["as it is"])]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
        rows.append([name, f"{firsts[name]:.2f}", f"{statistics.median(values):.3f}", spread])
    return rows


def measure(config: str, args: argparse.Namespace) -> None:
    height, width = map(int, args.size.split("x"))
    sizes = [(height, width)]
    if args.another_size:
        sizes.append((height + 64, width + 128))
    models = {
        name: build(config, compiled, args.precision, args.device)
        for name, compiled in NAMES.items()
    }
    for what, make in (("training step", training), ("forward", forward)):
        for size in sizes:
            batch = random_batch(args.images, *size, classes=1)
            runs = {name: make(model, batch) for name, model in models.items()}
            rows = rows_of(runs, args.rounds)
            title = f"{config}, {what}, {size[0]}x{size[1]}"
            headers = [title, "first, s", "s", "ratio"]
            print(tabulate(rows, headers, "pipe", disable_numparse=True), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="320x320", metavar="HxW")
    parser.add_argument("--another-size", action="store_true", help="also 64 and 128 px more")
    parser.add_argument("--images", type=int, default=2, help="of a training step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--configs", nargs="+", default=CONFIGS, metavar="NAME")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=["cpu", "cuda"])
    args = parser.parse_args()
    print(f"{machine()}, {args.device}, {args.precision}, {args.images} images a step")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for config in args.configs:
            measure(config, args)


if __name__ == "__main__":
    main()
