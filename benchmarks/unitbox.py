"""What it takes to train UnitBox with VGG-16 at full size: memory and seconds of a step.

    python benchmarks/unitbox.py [--config FILE] [--height H] [--width W] [--batch N] [--classes K]
        [--device cpu|cuda]

Prints the peak of the process (on a GPU: of what torch allocates) over two steps of forward,
backward and SGD with momentum, and the share of the model and the libraries before them.
"""

from __future__ import annotations

import argparse

from tabulate import tabulate

from common import add_device, machine
from memory import measure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/unitbox_vgg16_faces.yaml", metavar="FILE")
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1333)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--classes", type=int, default=1)
    add_device(parser)
    args = parser.parse_args()

    classes = ("MODEL.RETINANET.NUM_CLASSES", str(args.classes))
    size = (args.height, args.width)
    before, peak, step = measure(args.config, args.device, classes, size, args.batch, args.classes)
    print(machine(args.device))
    row = [f"{args.batch} x {args.height} x {args.width}", args.classes]
    row += [f"{before:.2f}", f"{peak:.2f}", f"{step:.3f}"]
    headers = ["images", "classes", "GiB before", "GiB at the peak", "s a step"]
    print(tabulate([row], headers, "github", disable_numparse=True))


if __name__ == "__main__":
    main()
