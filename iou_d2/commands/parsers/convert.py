"""Convert a checkpoint of mmdetection, torchvision, AdelaiDet and others to Detectron2, and back.

    iou-d2 convert vfnet_r50_fpn_1x_coco.pth vfnet_R_50.pth \\
        --from mmdet --to detectron2 --config-file configs/vfnet_R_50_FPN_1x.yaml
    iou-d2 convert resnext101_64x4d.pth X_101.pkl \\
        --from torchvision --to detectron2

The detectors of docs/WEIGHTS.md are converted whole, of any other one the ResNet or ResNeXt and the
FPN. Prints which tensors are left over and what the config has to say. Nothing that is in a file is
run without --trust-weights.
"""

from __future__ import annotations

import argparse

from iou_d2.choices import LAYOUTS
from iou_d2.commands.arguments import add_trust_argument


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", metavar="IN")
    parser.add_argument("output", metavar="OUT", help="a .pth, or for Detectron2 also a .pkl")
    parser.add_argument("--from", required=True, choices=LAYOUTS, dest="source")
    parser.add_argument("--to", required=True, choices=LAYOUTS, dest="target")
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        help="of the Detectron2 model; names and shapes are compared",
    )
    parser.add_argument(
        "--format",
        choices=("RGB", "BGR"),
        help="order of channels that the Detectron2 model takes (default: as --config-file, or "
        "else as IN); the other layouts are written for RGB",
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUT")
    add_trust_argument(parser)
    parser.add_argument(
        "--opts", nargs="+", default=[], metavar="KEY VALUE", help="overrides of --config-file"
    )
    args = parser.parse_args(argv)
    if args.source == args.target:
        parser.error("--from and --to are the same layout.")
    if "detectron2" not in (args.source, args.target) and (args.config_file or args.format):
        parser.error("--config-file and --format are for a Detectron2 model, and there is none.")
    if args.opts and not args.config_file:
        parser.error("--opts are overrides of a --config-file, and there is none.")
    return args
