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
from functools import partial

import torch
from detectron2.modeling.meta_arch import GeneralizedRCNN
from tabulate import tabulate
from torch import nn

from common import add_device, build, in_turn, machine, random_batch, seconds, training_runs

CONFIGS = ["quick/vfnet_own_data"]
KEYS = {"as it is": (), "compiled": ("MODEL.COMPILE", "True")}


def forward_runs(models: dict[str, nn.Module], batch: list[dict]) -> dict[str, Callable]:
    """The networks of each dense detector; of an R-CNN, its inference."""

    @torch.no_grad()
    def forward(model):
        model.eval()
        if isinstance(model, GeneralizedRCNN):
            return model(batch[:1])
        return model.predict(model.preprocess_image(batch[:1]).tensor)

    return {name: partial(forward, model) for name, model in models.items()}


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
        name: build(config, args.device, [*key, "MODEL.PRECISION", args.precision])
        for name, key in KEYS.items()
    }
    for what, make in (("training step", training_runs), ("forward", forward_runs)):
        for size in sizes:
            batch = random_batch(args.images, *size, classes=1)
            rows = rows_of(make(models, batch), args.rounds)
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
    add_device(parser)
    args = parser.parse_args()
    print(f"{machine(args.device)}, {args.precision}, {args.images} images a step")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for config in args.configs:
            measure(config, args)


if __name__ == "__main__":
    main()
