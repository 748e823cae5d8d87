"""Train a detector, or evaluate one with --eval-only.

    iou-d2 train --config quick/iou_retinanet_shapes
    iou-d2 train --config vfnet_R_50_FPN_1x --train coco:train.json --test coco:val.json \\
        OUTPUT_DIR output/x SOLVER.IMS_PER_BATCH 8
    iou-d2 train --config output/x/config.yaml --eval-only MODEL.WEIGHTS output/x/model_final.pth

OUTPUT_DIR receives model_final.pth, metrics.json, log.txt, config.yaml and run.json.
"""

from __future__ import annotations

import argparse

from iou_d2.commands.arguments import add_config_arguments, add_trust_argument


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    return make_parser(__doc__).parse_args(argv)


def make_parser(description: str) -> argparse.ArgumentParser:
    """`dist_url` of what it parses is None where Detectron2's default is to be taken."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR")
    add("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS on DATASETS.TEST")
    add("--num-gpus", type=int, default=1, metavar="N", help="GPUs a machine; 0 is the CPU")
    add("--num-processes", type=int, default=1, metavar="N", help="CPU processes a machine")
    add("--num-machines", type=int, default=1, metavar="N")
    add("--machine-rank", type=int, default=0, metavar="R", help="number of this machine, from 0")
    add(
        "--dist-url",
        metavar="URL",
        help="where processes meet: tcp://HOST:PORT of machine 0, or auto on a single machine",
    )
    add_trust_argument(parser)
    add_config_arguments(parser)
    return parser
