"""How well the IoU branch of a trained IoU-Net predicts, and what its gradient does to boxes.

    iou-d2 iou-branch output/iou_net_shapes [--images 200]

Prints the mean and the standard deviation of the predicted IoU by true IoU, for jittered boxes, as
the branch is trained, and for the detector's own (class score over 0.3, IoU over 0.5 with an object
of their class, plain NMS); and the IoU of the latter before and after refinement.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from iou_d2.commands.arguments import add_trust_argument
from iou_d2.errors import InputError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder with config.yaml and model_final.pth")
    parser.add_argument("--images", type=int, default=200)
    add_trust_argument(parser)
    args = parser.parse_args(argv)
    if args.images < 1:
        raise InputError(f"--images is at least 1, but it is {args.images}.")
    return args
