"""Draw the figures of IoU-Net's paper for a trained detector: NMS, recall, refinement, boxes.

    iou-d2 figures --config output/x/config.yaml --test coco:val.json --output output/x/figures \\
        MODEL.WEIGHTS output/x/model_final.pth

Runs once over the images. Writes figures.json with the numbers and as PNG, in docs/FIGURES.md: the
boxes that NMS, Soft-NMS, IoU-guided NMS and none leave; recall against the matching IoU; AP and IoU
against the steps of refinement by ascent and by regression; rivals for an object; paths of boxes.
What has no meaning for the detector is left out, with a sentence.
"""

from __future__ import annotations

import argparse

from iou_d2.commands.arguments import add_config_arguments, add_trust_argument
from iou_d2.errors import InputError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", metavar="FOLDER", help="by default figures in OUTPUT_DIR")
    parser.add_argument("--images", type=int, help="only the first ones; all by default")
    parser.add_argument("--steps", type=int, default=10, help="of refinement at most")
    parser.add_argument("--panels", type=int, default=4, help="boxes in a picture at most")
    add_trust_argument(parser)
    add_config_arguments(parser)
    args = parser.parse_args(argv)
    for name, least in (("images", 1), ("steps", 0), ("panels", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name} is at least {least}, but it is {value}.")
    return args
