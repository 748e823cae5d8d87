"""What it takes to train UnitBox with VGG-16 at full size: memory and seconds of a step.

    python benchmarks/unitbox.py [--config FILE] [--height H] [--width W] [--batch N] [--classes K]

Prints the peak of the process (on a GPU: of what torch allocates) over two steps of forward,
backward and SGD with momentum, and the share of the model and the libraries before them.
"""

from __future__ import annotations

import argparse
import platform
import resource

import torch
from tabulate import tabulate

from common import build, machine, random_batch, seconds, training_step


def peak_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if platform.system() == "Darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/unitbox_vgg16_faces.yaml", metavar="FILE")
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1333)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--classes", type=int, default=1)
    args = parser.parse_args()

    model = build(args.config, ["MODEL.RETINANET.NUM_CLASSES", str(args.classes)]).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-8, momentum=0.9)
    batch = random_batch(args.batch, args.height, args.width, args.classes, objects=20)
    before = peak_gib()
    times = [seconds(lambda: training_step(model, optimizer, batch)) for _ in range(2)]

    print(machine())
    row = [f"{args.batch} x {args.height} x {args.width}", args.classes]
    row += [f"{before:.2f}", f"{peak_gib():.2f}", f"{min(times):.1f}"]
    headers = ["images", "classes", "GiB before", "GiB at the peak", "s a step"]
    print(tabulate([row], headers, "github", disable_numparse=True))


if __name__ == "__main__":
    main()
