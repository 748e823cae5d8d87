"""Write a trained detector as a file that ONNX Runtime, TorchScript or torch.export runs.

    iou-d2 export --config output/x/config.yaml --output model.onnx \\
        MODEL.WEIGHTS output/x/model_final.pth

Normalisation, padding and NMS are in the file, which says in its metadata what it wants: see
docs/EXPORT.md. What it detects in two random images is compared with what the model detects.
"""

from __future__ import annotations

import argparse

from iou_d2.choices import FORMATS, OPSETS, OUTPUTS
from iou_d2.commands.arguments import add_trust_argument

# Those of iou_d2.commands.export.
TYPES = ("uint8", "float32")


def size_of(text: str) -> tuple[int, int] | None:
    """ "800x1333" -> (800, 1333); "dynamic" -> None."""
    if text == "dynamic":
        return None
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(
            f"a size is HEIGHTxWIDTH in pixels, such as 800x1333, or dynamic, not {text!r}"
        )
    return int(height), int(width)


def batch_of(text: str) -> int | None:
    """A number of images, or None for "dynamic"."""
    if text == "dynamic":
        return None
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(
            f"a batch is a number of images from 1 on, or dynamic, not {text!r}"
        )
    return int(text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", "--config-file", required=True, dest="config_file", metavar="CONFIG")
    add("--output", required=True, metavar="FILE", help="such as model.onnx")
    add("--format", choices=FORMATS, default="onnx")
    add(
        "--with",
        choices=OUTPUTS,
        default="detections",
        dest="outputs",
        help="all points, anchors or proposals, what NMS is given, what it leaves (default), or "
        "what IoU-Net makes of the detections of any detector",
    )
    add("--size", type=size_of, default="dynamic", metavar="HxW", help="pixels, or dynamic")
    add("--batch", type=batch_of, default="dynamic", metavar="N", help="images, or dynamic")
    add("--input", choices=TYPES, default="uint8", help="type of the images, 0..255 in both")
    add("--opset", type=int, default=17, metavar="N", help=f"{OPSETS[0]} to {OPSETS[-1]}")
    add(
        "--deform-conv",
        choices=("GridSample", "DeformConv"),
        default="GridSample",
        help="what deformable convolutions become; DeformConv from opset 19 on",
    )
    add_trust_argument(parser)
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of the config")
    return parser.parse_args(argv)
