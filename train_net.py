"""Train or evaluate a detector of iou_d2, as in any Detectron2 project.

    python train_net.py --config-file configs/quick/iou_retinanet_shapes.yaml
    python train_net.py --config-file output/x/config.yaml --eval-only \\
        MODEL.WEIGHTS output/x/model_final.pth
    python train_net.py --config-file configs/iou_retinanet_R_50_FPN_1x.yaml \\
        DATASETS.TRAIN "('coco:train.json:images',)" DATASETS.TEST "('voc:VOC2007:test',)"
"""

import sys

from iou_d2.commands.main import run_command

if __name__ == "__main__":
    run_command("train", sys.argv[1:])
