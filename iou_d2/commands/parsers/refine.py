"""Apply a trained IoU-Net to the detections of any detector: IoU-guided NMS and refinement.

    iou-d2 refine \\
        --config-file configs/quick/iou_net_standalone_shapes.yaml \\
        --gt instances.json --images images --results coco_instances_results.json \\
        --output refined.json MODEL.WEIGHTS output/iou_net_standalone_shapes/model_final.pth

Reads and writes COCO results, and prints AP before and after where --gt has annotations. Everything
in MODEL.IOU_NET can be switched at the end of the command line, such as MODEL.IOU_NET.NMS plain;
MODEL.ROI_HEADS has SCORE_THRESH_TEST and NMS_THRESH_TEST. IoU-guided NMS can only do its work on
results that nothing has thinned out: make them with the NMS threshold of the detector, such as
MODEL.ROI_HEADS.NMS_THRESH_TEST, at 1.0 (arXiv 1807.11590, Table 1) and with
TEST.DETECTIONS_PER_IMAGE -1.
"""

from __future__ import annotations

import argparse

from iou_d2.commands.arguments import add_trust_argument


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", "--config-file", required=True, dest="config_file")
    parser.add_argument("--gt", required=True, metavar="FILE", help="ground truth, COCO JSON")
    parser.add_argument("--images", required=True, metavar="FOLDER")
    parser.add_argument("--results", required=True, metavar="FILE", help="COCO results to refine")
    parser.add_argument("--output", required=True, metavar="FILE", help="refined COCO results")
    add_trust_argument(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    return parser.parse_args(argv)
